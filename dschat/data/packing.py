"""Packing: several texts in one row, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np
import torch

from dschat.algorithms.types import PackedBatch
from dschat.data.collate import pad
from dschat.data.datasets import IGNORED, SFTDataset


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

    def __init__(self, dataset: SFTDataset):
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
