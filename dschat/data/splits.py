"""The rows of each step, and the blend of several sources."""

import bisect
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dschat.data.row import Row
from dschat.data.sources import Part, Source

SPLIT_SALT = 2
NUM_STEPS = 3


def parse_shares(data_split: str) -> list[Fraction]:
    """Parse the three shares of a --data_split such as "2,4,4".

    Raises:
        ValueError: unless there are three numbers of zero or more, at least one above zero.
    """
    try:
        shares = [Fraction(word.strip()) for word in data_split.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if len(shares) != NUM_STEPS or min(shares) < 0 or not any(shares):
        raise ValueError(
            f"--data_split {data_split}: give the shares of steps 1, 2 and 3 as three numbers of "
            "zero or more, not all zero, such as 2,4,4."
        )
    return shares


def share_sizes(num_rows: int, shares: Sequence[Fraction]) -> list[int]:
    """Return the number of rows of each share, by the largest remainder method.

    The sizes sum to `num_rows`. Each is within one row of its exact quota, and a zero share gets no
    row. Every share gets the whole part of its quota; the remaining rows go one each to the largest
    remainders, the earlier share first if two are equal. Fractions keep equal remainders equal.
    """
    quotas = [num_rows * share / sum(shares) for share in shares]
    sizes = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (sizes[i] - quotas[i], i))
    for i in by_remainder[: num_rows - sum(sizes)]:
        sizes[i] += 1
    return sizes


def split_indices(num_rows: int, data_split: str, *, step: int, data_seed: int) -> list[int]:
    """Return the rows of step 1, 2 or 3, in a random order.

    The rows of the three steps are disjoint and together are all rows. The order depends only on
    `num_rows` and `data_seed`, so that every rank computes the same one and nothing is stored.

    Raises:
        ValueError: for a malformed `data_split`, see `parse_shares`.
    """
    assert 1 <= step <= NUM_STEPS
    sizes = share_sizes(num_rows, parse_shares(data_split))
    begin = sum(sizes[: step - 1])
    # RandomState's streams are frozen, so that the steps agree even across library versions.
    order = np.random.RandomState([data_seed & 0xFFFFFFFF, SPLIT_SALT]).permutation(num_rows)
    return order[begin : begin + sizes[step - 1]].tolist()


class Blend(Sequence):
    """The parts of several sources, concatenated to one sequence of `Row`."""

    def __init__(self, pieces: Sequence[tuple[Source, Part]]):
        self.pieces = list(pieces)
        self._ends = np.cumsum(self.sizes).tolist()

    def __len__(self) -> int:
        """Return the number of rows of all pieces."""
        return self._ends[-1] if self._ends else 0

    @property
    def sizes(self) -> list[int]:
        """Rows of each piece."""
        return [len(part) for _, part in self.pieces]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the index of the piece that holds `position`, and the row's index within it."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        piece = bisect.bisect_right(self._ends, position)
        begin = self._ends[piece - 1] if piece else 0
        return piece, position - begin

    def __getitem__(self, position: int) -> Row:
        """Return the row at `position`; raise ValueError, naming its place, if it is malformed."""
        piece, index = self.locate(position)
        source, part = self.pieces[piece]
        return source.row(part[index], place=part.place(index))


def first_indices_per_source(rows: Sequence[Row], most: int, *, least: int = 1) -> list[int]:
    """Return the indices of the first rows of each source, in proportion to the sources' sizes.

    The counts follow the largest remainder method.

    Args:
        rows: a `Blend`, or any sequence, which counts as one source.
        most: the most rows in all.
        least: the fewest rows of each source, if it has that many and `most` has room for that many
            of every source.
    """
    sizes = rows.sizes if isinstance(rows, Blend) else [len(rows)]
    sizes = [size for size in sizes if size]
    if not sizes:
        return []
    counts = share_sizes(min(most, sum(sizes)), [Fraction(size) for size in sizes])
    floors = [min(size, least, most // len(sizes)) for size in sizes]
    while True:
        spare = [count - floor for count, floor in zip(counts, floors, strict=True)]
        if min(spare) >= 0:
            break
        counts[spare.index(max(spare))] -= 1
        counts[spare.index(min(spare))] += 1
    indices = []
    begin = 0
    for size, count in zip(sizes, counts, strict=True):
        indices.extend(range(begin, begin + count))
        begin += size
    return indices
