"""Which rows belong to which step, and the blend of several sources."""

import bisect
from fractions import Fraction
from typing import Sequence

import numpy as np

from dschat.data.row import Row
from dschat.data.sources import Part, Source

SPLIT_SALT = 2
NUM_STEPS = 3


def parse_shares(data_split: str) -> list[Fraction]:
    """The three shares of "2,4,4".

    Raises:
        ValueError: unless they are three numbers of zero or more, one of them above zero.
    """
    try:
        shares = [Fraction(word.strip()) for word in data_split.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if len(shares) != NUM_STEPS or min(shares) < 0 or not any(shares):
        raise ValueError(
            f"--data_split {data_split}: give the shares of steps 1, 2 and 3 as three numbers of zero or more, not all "
            "zero, such as 2,4,4."
        )
    return shares


def share_sizes(num_rows: int, shares: Sequence[Fraction]) -> list[int]:
    """Rows of each share: they sum to `num_rows`, each within one of what is due to it, a zero share exactly zero.

    Largest remainder: every share gets the whole part of what it is due, and the rows left over go one each to the
    largest remainders, the earlier share first where two are equal. Fractions keep equal remainders equal.
    """
    due = [num_rows * share / sum(shares) for share in shares]
    sizes = [int(part) for part in due]
    by_remainder = sorted(range(len(shares)), key=lambda i: (sizes[i] - due[i], i))
    for i in by_remainder[: num_rows - sum(sizes)]:
        sizes[i] += 1
    return sizes


def split_indices(num_rows: int, data_split: str, *, stage: int, data_seed: int) -> list[int]:
    """The rows of step `stage` (1, 2 or 3), in a random order that depends on `num_rows` and `data_seed` alone.

    The three steps' rows are disjoint and together are all rows, whatever process asks: nothing is stored.

    Raises:
        ValueError: for a malformed `data_split`, see `parse_shares`.
    """
    assert 1 <= stage <= NUM_STEPS
    sizes = share_sizes(num_rows, parse_shares(data_split))
    begin = sum(sizes[: stage - 1])
    # RandomState's streams are frozen for good, so that the steps agree even across library versions.
    order = np.random.RandomState([data_seed & 0xFFFFFFFF, SPLIT_SALT]).permutation(num_rows)
    return order[begin : begin + sizes[stage - 1]].tolist()


class Blend(Sequence):
    """Parts of several sources behind each other, as one sequence of `Row`."""

    def __init__(self, pieces: Sequence[tuple[Source, Part]]):
        self.pieces = list(pieces)
        self._ends = np.cumsum(self.sizes).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def sizes(self) -> list[int]:
        """Rows of each piece."""
        return [len(part) for _, part in self.pieces]

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the piece and the row in it that stand at `position`."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        piece = bisect.bisect_right(self._ends, position)
        return piece, position - (self._ends[piece - 1] if piece else 0)

    def __getitem__(self, position: int) -> Row:
        piece, at = self.locate(position)
        source, part = self.pieces[piece]
        return source.row(part[at], place=part.place(at))


def first_of_each(rows: Sequence[Row], most: int, *, least: int = 1) -> list[int]:
    """Where the first rows of each source of `rows` stand, at most `most` in all, in proportion to the sources' sizes.

    Largest remainder, but no source gives fewer than `least` rows, as far as it has them and `most` allows as many for all.
    """
    sizes = [size for size in (rows.sizes if isinstance(rows, Blend) else [len(rows)]) if size]
    counts = share_sizes(min(most, sum(sizes)), [Fraction(size) for size in sizes]) if sizes else []
    floors = [min(size, least, most // len(sizes)) for size in sizes]
    while any(count < floor for count, floor in zip(counts, floors)):
        spare = [count - floor for count, floor in zip(counts, floors)]
        counts[spare.index(max(spare))] -= 1
        counts[spare.index(min(spare))] += 1
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [begin + position for begin, count in zip(begins, counts) for position in range(count)]
