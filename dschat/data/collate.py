"""Collate functions: dataset items to batches, padded to the longest item of the batch."""

from collections.abc import Sequence

import torch

from dschat.algorithms.types import PairBatch, PromptBatch, TextBatch
from dschat.data.datasets import IGNORED


def collate_text(items: Sequence[dict], pad_id: int) -> TextBatch:
    """Pad items of `SFTDataset` on the right; labels are padded with -100."""
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_id)
    labels, _ = pad([item["labels"] for item in items], IGNORED)
    return TextBatch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def collate_pairs(items: Sequence[dict], pad_id: int) -> PairBatch:
    """Stack items of `PairDataset`, padded on the right to one length.

    All chosen rows come first, then all rejected rows in the same order.
    """
    chosen = [item["chosen_ids"] for item in items]
    rejected = [item["rejected_ids"] for item in items]
    rows = chosen + rejected
    input_ids, attention_mask = pad(rows, pad_id)
    prompt_lengths = [item["num_prompt"] for item in items] * 2
    label_rows = [
        [IGNORED] * length + row[length:] for length, row in zip(prompt_lengths, rows, strict=True)
    ]
    labels, _ = pad(label_rows, IGNORED)
    margins = torch.tensor([item.get("margin", 0.0) for item in items] * 2, dtype=torch.float32)
    return PairBatch(
        input_ids=input_ids, attention_mask=attention_mask, labels=labels, margins=margins
    )


def collate_prompts(items: Sequence[dict], pad_id: int) -> PromptBatch:
    """Pad items of `PromptDataset` on the left."""
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_id, left=True)
    index = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    return PromptBatch(input_ids=input_ids, attention_mask=attention_mask, index=index)


def pad(
    rows: Sequence[Sequence[int]], pad_value: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad `rows` to one length.

    Args:
        rows: B lists of token ids; T is the length of the longest.
        pad_value: fills the padded positions.
        left: pad on the left instead of the right.

    Returns:
        The values [B, T] int64, and their mask [B, T] int64, which is 1 on values and 0 on padding.
        The mask comes from the lengths, since the pad token may also be a token of the text.
    """
    longest = max(len(row) for row in rows)
    values = torch.full((len(rows), longest), pad_value, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if left else slice(0, len(row))
        values[i, columns] = torch.tensor(row, dtype=torch.int64)
        mask[i, columns] = 1
    return values, mask
