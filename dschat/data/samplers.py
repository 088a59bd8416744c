"""Samplers: which rows a rank reads in an epoch, and in which order."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from dschat.data.packing import pack_best_fit

logger = logging.getLogger(__name__)


class ShardedSampler(Sampler[Any]):
    """One rank's rows; every rank has the same number of full windows.

    The order of an epoch is a permutation by (seed, epoch), or 0, 1, 2, ... without `shuffle`. It
    is padded with rows from its own beginning until its length is a multiple of
    ``world_size * batch_size * window``. Position i belongs to rank ``i % world_size``. All repeats
    are at the end: the first `num_unique` rows of a rank are not repeats.

    Args:
        num_rows: rows of the dataset, at least 1.
        rank: the rank whose rows are sampled.
        world_size: the number of ranks.
        batch_size: rows of one batch of one rank.
        window: batches of one update (gradient accumulation), so that no window is partial.
        shuffle: permute in each epoch; `set_epoch` sets the epoch.
        seed: seed of the permutation.
        draws: for a weighted blend, (rows of a source, how many of them an epoch draws), in the
            order of the sources; None: each row once.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        window: int = 1,
        shuffle: bool,
        seed: int,
        draws: Sequence[tuple[int, int]] | None = None,
    ):
        assert num_rows > 0 and 0 <= rank < world_size
        self.draws = draws
        if draws is not None:
            num_rows = sum(count for _, count in draws)
        self.num_rows = num_rows
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.start = 0
        multiple = world_size * batch_size * window
        self.total = -(-num_rows // multiple) * multiple
        if shuffle and num_rows < multiple:
            logger.warning(
                f"{num_rows} rows are fewer than the {multiple} of one update (world size "
                f"{world_size} x {batch_size} rows x {window} batches): an update uses a row up to "
                f"{-(-multiple // num_rows)} times"
            )

    @property
    def num_unique(self) -> int:
        """Rows of this rank before the padding, which repeats rows of any rank."""
        if self.rank >= self.num_rows:
            return 0
        return -(-(self.num_rows - self.rank) // self.world_size)

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Set the epoch of the next pass, which leaves out this rank's first `start` rows."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        """Return the rows of this rank in a whole epoch, whatever `start` leaves out."""
        return self.total // self.world_size

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this rank's rows of the epoch, beginning at `start`."""
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = _shuffled(self.num_rows, seed=self.seed, epoch=self.epoch, draws=self.draws)
        shard = np.resize(order, self.total)[self.rank :: self.world_size]
        return iter(shard[self.start :].tolist())


class PackedSampler(ShardedSampler):
    """One rank's packed rows, each a list of the indices of its items.

    An epoch's rows are packed and shuffled by (seed, epoch). Their number follows from the lengths
    alone, so it is the same in each epoch. But a weighted blend draws other items in each epoch:
    there the number is that of the first epoch, and later ones leave out or repeat a few rows.

    Args:
        lengths: [N] int64, tokens of each item.
        capacity: tokens of a row.
        rank: see `ShardedSampler`, as for `world_size`, `window` and `seed`.
        world_size: the number of ranks.
        batch_size: rows of one batch of one rank.
        window: batches of one update.
        seed: seed of packing and shuffling.
        draws: see `ShardedSampler`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        capacity: int,
        rank: int,
        world_size: int,
        batch_size: int,
        window: int = 1,
        seed: int,
        draws: Sequence[tuple[int, int]] | None = None,
    ):
        self.lengths = lengths
        self.capacity = capacity
        self.item_draws = draws
        super().__init__(
            len(self._pack(seed=seed, epoch=0)),
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            window=window,
            shuffle=True,
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over this rank's rows of the epoch, beginning at `start`."""
        rows = self._pack(seed=self.seed, epoch=self.epoch)
        order = np.random.RandomState([self.seed & 0xFFFFFFFF, self.epoch, 1]).permutation(
            len(rows)
        )
        shard = np.resize(order, self.total)[self.rank :: self.world_size]
        return (rows[i] for i in shard[self.start :])

    def _pack(self, *, seed: int, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch, over all ranks; of equal lengths the order is drawn."""
        items = _shuffled(len(self.lengths), seed=seed, epoch=epoch, draws=self.item_draws)
        rows = pack_best_fit(self.lengths[items], capacity=self.capacity)
        return [items[row].tolist() for row in rows]


def _shuffled(
    num_rows: int, *, seed: int, epoch: int, draws: Sequence[tuple[int, int]] | None
) -> np.ndarray:
    """Return the rows of an epoch in their order; see `ShardedSampler`."""
    random_state = np.random.RandomState([seed & 0xFFFFFFFF, epoch])
    order = np.arange(num_rows) if draws is None else _draw_rows(draws, random_state)
    return random_state.permutation(order)


def _draw_rows(draws: Sequence[tuple[int, int]], random_state: np.random.RandomState) -> np.ndarray:
    """Return the rows of an epoch: of each source whole passes, and then rows at random."""
    drawn = []
    begin = 0
    for num_rows, count in draws:
        passes, rest = divmod(count, max(1, num_rows))
        drawn += [np.arange(begin, begin + num_rows)] * passes
        drawn.append(begin + random_state.permutation(num_rows)[:rest])
        begin += num_rows
    return np.concatenate(drawn)
