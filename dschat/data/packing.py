"""Packing: several texts in one row, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np
import torch

from dschat.algorithms.types import PackedBatch, PackedPairBatch
from dschat.data.collate import pad
from dschat.data.datasets import IGNORED, TextDataset


def pack_best_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Pack texts into rows by best-fit decreasing (Johnson et al. 1974).

    The longest text comes first; each goes to the fullest row that has room for it, else to a new
    one. Of texts of one length the earlier ones come first.

    Args:
        lengths: tokens of each text, 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        The indices of the texts of each row.
    """
    by_room: dict[int, list[list[int]]] = {}  # rows by the tokens that are free in them
    rooms = 0  # bit n is set if a row has n tokens free
    rows: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            row = []
            rows.append(row)
        row.append(index)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


class PackedDataset:
    """The items of a dataset, read a packed row at a time."""

    def __init__(self, dataset: TextDataset):
        """Read items of `dataset`, which is prepared."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of items, not of rows."""
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> list[dict]:
        """Return the items of one row."""
        return [self.dataset[index] for index in indices]

    @property
    def text_format(self) -> str:
        """The format of the first item; see `TextDataset`."""
        return self.dataset.text_format

    @property
    def items_digest(self) -> str | None:
        """A hash of all items; see `TextDataset`."""
        return self.dataset.items_digest


def collate_packed(rows: Sequence[Sequence[dict]], pad_id: int) -> PackedBatch:
    """Concatenate the items of each row; pad the rows on the right to the longest.

    The first token of each item has no label: the token before it is of another text.
    """
    ids = [[token for item in row for token in item["input_ids"]] for row in rows]
    label_rows = [
        [label for item in row for label in [IGNORED, *item["labels"][1:]]] for row in rows
    ]
    input_ids, attention_mask = pad(ids, pad_id)
    labels, _ = pad(label_rows, IGNORED)
    positions = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        lengths = [len(item["input_ids"]) for item in row]
        lengths.append(input_ids.shape[1] - sum(lengths))
        positions[i] = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(
        input_ids=input_ids, attention_mask=attention_mask, labels=labels, position_ids=positions
    )


def collate_packed_pairs(rows: Sequence[Sequence[dict]], pad_id: int) -> PackedPairBatch:
    """Concatenate the texts of the pairs of each row; pad the rows on the right to the longest.

    A chosen text is followed by the rejected one. Labels are as in ``collate_packed``.
    """
    texts_of_rows = [[text for pair in row for text in _texts_of_pair(pair)] for row in rows]
    packed = collate_packed(texts_of_rows, pad_id)
    width = packed.input_ids.shape[1]
    places = []
    for number, texts in enumerate(texts_of_rows):
        start = number * width
        for text in texts:
            end = start + len(text["input_ids"])
            places.append(range(start, end))
            start = end
    # The chosen texts, which are at even places, come first.
    columns, text_mask = pad([*places[::2], *places[1::2]], 0)
    margins = [pair.get("margin", 0.0) for row in rows for pair in row]
    return PackedPairBatch(
        **vars(packed),
        margins=torch.tensor(margins * 2, dtype=torch.float32),
        places=columns,
        text_mask=text_mask,
    )


def _texts_of_pair(pair: dict) -> list[dict]:
    """Return the chosen and the rejected text of a pair, with labels on the answers."""
    texts = []
    for name in ("chosen_ids", "rejected_ids"):
        ids = pair[name]
        num_prompt = pair["num_prompt"]
        texts.append({"input_ids": ids, "labels": [IGNORED] * num_prompt + ids[num_prompt:]})
    return texts
