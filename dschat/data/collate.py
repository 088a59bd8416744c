"""Items to padded batches, as long as the longest item of the batch."""

from typing import Sequence

import torch

from dschat.algorithms.types import PairBatch, PromptBatch, TextBatch
from dschat.data.datasets import IGNORED


def collate_text(items: Sequence[dict], pad_id: int) -> TextBatch:
    """Items of `SFTDataset`, padded on the right; labels with -100."""
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_id)
    labels, _ = pad([item["labels"] for item in items], IGNORED)
    return TextBatch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def collate_pairs(items: Sequence[dict], pad_id: int) -> PairBatch:
    """Items of `PairDataset`, all chosen rows and then all rejected ones, padded on the right to one length."""
    rows = [item["chosen_ids"] for item in items] + [item["rejected_ids"] for item in items]
    input_ids, attention_mask = pad(rows, pad_id)
    prompts = [item["num_prompt"] for item in items] * 2
    labels, _ = pad(
        [[IGNORED] * prompt + row[prompt:] for prompt, row in zip(prompts, rows)], IGNORED
    )
    return PairBatch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def collate_prompts(items: Sequence[dict], pad_id: int) -> PromptBatch:
    """Items of `PromptDataset`, padded on the left."""
    input_ids, attention_mask = pad([item["input_ids"] for item in items], pad_id, left=True)
    index = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    return PromptBatch(input_ids=input_ids, attention_mask=attention_mask, index=index)


def pad(
    rows: Sequence[Sequence[int]], pad_value: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` as one tensor [B, T] int64, and its mask [B, T] int64 that holds 1 where a row has a value.

    The mask comes from the lengths, since the pad token may also be a token of the text.
    """
    longest = max(len(row) for row in rows)
    values = torch.full((len(rows), longest), pad_value, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        values[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = 1
    return values, mask
