"""The rows of each step, and the blend of several sources."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from dschat.data.row import Row
from dschat.data.sources import Part, Source

HOLD_OUT_SALT = 1
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


@dataclass
class Assignment:
    """Which share each conversation's beginning belongs to, over all sources seen so far.

    Rows with one beginning get one share, whatever source they are in. Otherwise the shares of each
    source are exact within the rows of one beginning. The beginnings are ordered by a hash, so that
    a row more or less moves at most one beginning at each border between two shares.
    """

    seed: int
    salt: int
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # sorted
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))  # of `groups`

    def assign(self, group: np.ndarray, shares: Sequence[Fraction]) -> np.ndarray:
        """Return the share [N] int8 of rows with the beginnings `group` [N] uint64."""
        unique, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
        labels = self._known(unique)
        sizes = np.array(share_sizes(len(group), shares))
        for label in range(len(shares)):
            sizes[label] -= counts[labels == label].sum()
        free = np.flatnonzero(labels < 0)
        free = free[np.argsort(_mix(unique[free], self.seed, self.salt), kind="stable")]
        # A beginning belongs to the share in which the middle of its rows falls.
        middles = np.cumsum(counts[free]) - counts[free] / 2
        ends = np.cumsum(np.maximum(sizes, 0))
        ends = ends * (counts[free].sum() / max(1, ends[-1]))
        found = np.searchsorted(ends, middles, side="right")
        positive = [label for label, share in enumerate(shares) if share > 0]
        labels[free] = np.minimum(found, positive[-1])
        _fill_empty_shares(labels, free, middles, sizes, ends)
        self._remember(unique, labels)
        return labels[inverse]

    def fix(self, group: np.ndarray, *, label: int) -> None:
        """Give the beginnings `group` [N] the share `label`, whatever comes."""
        unique = np.unique(group)
        self._remember(unique, np.full(len(unique), label, dtype=np.int8))

    def _known(self, unique: np.ndarray) -> np.ndarray:
        """Return the shares that are already given, and -1 for the others."""
        labels: np.ndarray = np.full(len(unique), -1, dtype=np.int8)
        if len(self.groups):
            at = np.minimum(np.searchsorted(self.groups, unique), len(self.groups) - 1)
            found = self.groups[at] == unique
            labels[found] = self.labels[at[found]]
        return labels

    def _remember(self, unique: np.ndarray, labels: np.ndarray) -> None:
        new = ~np.isin(unique, self.groups)
        groups = np.concatenate([self.groups, unique[new]])
        order = np.argsort(groups, kind="stable")
        self.groups = groups[order]
        self.labels = np.concatenate([self.labels, labels[new]])[order]


def share_of(group: int, shares: Sequence[Fraction], seed: int, salt: int) -> int:
    """Return the share of one beginning if nothing is known of the others.

    The beginnings have the order that `Assignment` gives them, but the borders are those of an
    endless number of rows.
    """
    place = int(_mix(np.array([group], dtype=np.uint64), seed, salt)[0])
    end = Fraction(0)
    for label, share in enumerate(shares):
        end += share
        if place * sum(shares) < end * 2**64:
            return label
    return len(shares) - 1


def _fill_empty_shares(
    labels: np.ndarray, free: np.ndarray, middles: np.ndarray, sizes: np.ndarray, ends: np.ndarray
) -> None:
    """Give a share that is due rows, but got no beginning, the one nearest to its place."""
    for label in np.flatnonzero(sizes > 0):
        if (labels == label).any() or not len(free):
            continue
        nearest = int(np.argmin(np.abs(middles - (ends[label] - sizes[label] / 2))))
        if (labels == labels[free[nearest]]).sum() > 1:
            labels[free[nearest]] = label


def _mix(values: np.ndarray, seed: int, salt: int) -> np.ndarray:
    """Hash 64-bit numbers with a seed, by the finalizer of SplitMix64 (Steele et al., 2014)."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + salt) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


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

    def __getitem__(self, position: int) -> Row:  # type: ignore[override]  # no slices
        """Return the row at `position`; raise ValueError, naming its place, if it is malformed."""
        piece, index = self.locate(position)
        source, part = self.pieces[piece]
        return source.row(part, index)

    def take(self, positions: Sequence[int] | np.ndarray) -> "Blend":
        """Return the rows at `positions`, which must be in ascending order, as a new blend."""
        positions = np.asarray(positions, dtype=np.int64)
        pieces = []
        begin = 0
        for source, part in self.pieces:
            inside = positions[(positions >= begin) & (positions < begin + len(part))] - begin
            pieces.append((source, part.take(inside)))
            begin += len(part)
        return Blend(pieces)


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
    indices: list[int] = []
    begin = 0
    for size, count in zip(sizes, counts, strict=True):
        indices.extend(range(begin, begin + count))
        begin += size
    return indices
