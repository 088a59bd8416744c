"""From the data options to data sets and loaders: all that a main needs."""

import functools
import logging
from typing import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import PreTrainedTokenizerBase

from dschat.config.options import DataOptions
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, truncation_report
from dschat.data.sources import Part, Source, load_source
from dschat.data.splits import Blend, first_of_each, parse_shares, split_indices
from dschat.runtime import dist

logger = logging.getLogger(__name__)


class ShardedSampler(Sampler[int]):
    """One rank's rows, so many on every rank that all have the same number of full windows.

    The order of an epoch is a permutation by (seed, epoch), or 0, 1, 2, ... without `shuffle`. It is padded by
    starting again from its beginning until it divides by ``world_size * batch_size * window``, and position i belongs
    to rank ``i % world_size``. All repeats stand at the end: the first `num_unique` rows of a rank are no repeats.

    Args:
        num_rows: rows of the data set, at least 1.
        rank, world_size: which of how many processes.
        batch_size: rows of one batch of one rank.
        window: batches of one optimizer step (gradient accumulation), so that no partial window exists.
        shuffle: permute anew every epoch; `set_epoch` tells which it is.
        seed: of the permutation.
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
    ):
        assert num_rows > 0 and 0 <= rank < world_size
        self.num_rows = num_rows
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = self.start = 0
        multiple = world_size * batch_size * window
        self.total = -(-num_rows // multiple) * multiple
        if shuffle and num_rows < multiple:
            logger.warning(
                f"{num_rows} rows are fewer than the {multiple} of one step ({world_size} processes x {batch_size} "
                f"rows x {window} batches): a step uses a row up to {-(-multiple // num_rows)} times"
            )

    @property
    def num_unique(self) -> int:
        """Rows of this rank before the padding begins; what follows repeats rows of some rank."""
        return (
            -(-(self.num_rows - self.rank) // self.world_size) if self.rank < self.num_rows else 0
        )

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the permutation of the next pass, which leaves out this rank's first `start` rows."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.total // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.RandomState([self.seed & 0xFFFFFFFF, self.epoch]).permutation(
                self.num_rows
            )
        return iter(
            np.resize(order, self.total)[self.rank :: self.world_size][self.start :].tolist()
        )


def make_loader(
    dataset: Dataset,
    collate: Callable,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    shuffle: bool,
    seed: int,
    window: int = 1,
) -> DataLoader:
    """Batches of one rank; call ``loader.sampler.set_epoch(epoch)`` before each pass. See `ShardedSampler`.

    Items are tokenised as they are asked for, in this process: that costs about a millisecond a row, far below a
    training step, and worker processes would each fork the whole trainer.
    """
    sampler = ShardedSampler(
        len(dataset),
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        window=window,
        shuffle=shuffle,
        seed=seed,
    )
    return DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate, num_workers=0
    )


def build_sft_data(
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sft_only_data_path: Sequence[str],
    max_seq_len: int,
    end_token_id: int,
) -> tuple[SFTDataset, SFTDataset]:
    """Training and evaluation data of step 1: its share of --data_path, and all of `sft_only_data_path`.

    Raises:
        ValueError: for data that cannot be used, rows without an answer, or a part that is empty.
    """
    blends = open_blends(data, stage=1, needs="chosen", whole=sft_only_data_path)
    options = dict(
        max_seq_len=max_seq_len, prompt_format=data.prompt_format, end_token_id=end_token_id
    )
    return _reported(SFTDataset(rows, tokenizer, **options) for rows in blends)


def build_pair_data(
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    end_token_id: int,
    cut_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[PairDataset, PairDataset]:
    """Training and evaluation data of step 2 and of DPO; only training pairs are cut by `cut_fraction`, see `PairDataset`.

    Raises:
        ValueError: for data that cannot be used, rows without a rejected answer, or a part that is empty.
    """
    train, held_out = open_blends(data, stage=2, needs="rejected")
    options = dict(
        max_seq_len=max_seq_len, prompt_format=data.prompt_format, end_token_id=end_token_id
    )
    return _reported(
        [
            PairDataset(train, tokenizer, cut_fraction=cut_fraction, seed=seed, **options),
            PairDataset(held_out, tokenizer, **options),
        ]
    )


def build_prompt_data(
    data: DataOptions, tokenizer: PreTrainedTokenizerBase, *, max_prompt_len: int
) -> tuple[PromptDataset, PromptDataset]:
    """Training and evaluation prompts of step 3.

    Raises:
        ValueError: for data that cannot be used, or a part that is empty.
    """
    options = dict(max_prompt_len=max_prompt_len, prompt_format=data.prompt_format)
    return _reported(
        PromptDataset(rows, tokenizer, **options)
        for rows in open_blends(data, stage=3, needs="prompt")
    )


def open_blends(
    data: DataOptions, *, stage: int, needs: str, whole: Sequence[str] = ()
) -> tuple[Blend, Blend]:
    """The training and evaluation rows of a step: its share of each source of --data_path, and all of those of `whole`.

    Both parts are split by --data_split, so that no two steps share an evaluation row either.

    Args:
        needs: "prompt", "chosen" or "rejected": the text that every row must have.

    Raises:
        ValueError: naming the flag, the source and the row.
    """
    parse_shares(data.data_split)
    pieces: dict[str, list[tuple[Source, Part]]] = {"train": [], "eval": []}
    for path, is_whole in [(path, False) for path in data.data_path] + [
        (path, True) for path in whole
    ]:
        source = load_source(
            path,
            eval_fraction=data.eval_fraction,
            data_seed=data.data_seed,
            skip_bad_rows=data.skip_bad_rows,
            cache_dir=data.data_output_path,
        )
        for name in pieces:
            part = getattr(source, name)
            if not is_whole:
                part = part.take(
                    split_indices(len(part), data.data_split, stage=stage, data_seed=data.data_seed)
                )
            pieces[name].append(
                (source, _having(part, needs, stage=stage, skip=source.skip_bad_rows))
            )
        logger.info(
            "step %d: %s: %s",
            stage,
            path,
            ", ".join(f"{len(pieces[n][-1][1])} {n} rows" for n in pieces),
        )
    for name, found in pieces.items():
        if not any(len(part) for _, part in found):
            num_all = sum(len(getattr(source, name)) for source, _ in found)
            raise ValueError(
                f"--data_split {data.data_split} leaves step {stage} no {name} row of --data_path "
                f"{' '.join(data.data_path)} (their {name} parts have {num_all} rows in all). Give step {stage} a "
                "larger share, more rows, or a larger --eval_fraction."
            )
    return Blend(pieces["train"]), Blend(pieces["eval"])


def _having(part: Part, needs: str, *, stage: int, skip: bool) -> Part:
    """The rows of `part` that have the text `needs`; a ValueError if others are there and may not be skipped."""
    missing = np.flatnonzero(~part.has[needs])
    if not len(missing):
        return part
    first = f'{part.place(missing[0])}: no "{needs}", which step {stage} needs'
    if not skip:
        raise ValueError(
            f"{first}; {len(missing)} of the {len(part)} rows of its share lack it. Give it, take the set out of "
            "--data_path, or leave such rows out with --skip_bad_rows."
        )
    logger.warning("left out %d of %d rows: %s", len(missing), len(part), first)
    return part.take(np.flatnonzero(part.has[needs]))


def _reported(datasets) -> tuple:
    train, held_out = datasets
    # Also renders rows of every source in both parts, so that a format they do not fit shows before any model loads.
    for name, dataset in (("training", train), ("evaluation", held_out)):
        logger.info(
            "%s data: %d rows; %s",
            name,
            len(dataset),
            truncation_report(dataset, trained=dataset is train),
        )
    return train, held_out


def make_loaders(
    train: Dataset,
    held_out: Dataset,
    collate: Callable,
    *,
    pad_id: int,
    train_batch_size: int,
    eval_batch_size: int,
    window: int,
    seed: int,
) -> tuple[DataLoader, DataLoader]:
    """This process's loaders of a step: training rows shuffled in full windows, held-out rows in their own order.

    Args:
        collate: ``collate_text``, ``collate_pairs`` or ``collate_prompts``.
        window: training batches per optimizer step (step 3: per rollout).

    Raises:
        ValueError: the training rows are fewer than one batch of each process.
    """
    least = dist.world_size() * train_batch_size
    if len(train) < least:
        raise ValueError(
            f"{len(train)} training rows are fewer than one batch of each process ({dist.world_size()} processes x "
            f"{train_batch_size} rows). Give more rows by --data_path or a larger share by --data_split, or a smaller "
            "--per_device_train_batch_size (step 3: --per_device_generation_batch_size)."
        )
    collate = functools.partial(collate, pad_id=pad_id)
    placed = dict(rank=dist.rank(), world_size=dist.world_size(), seed=seed)
    return (
        make_loader(
            train, collate, batch_size=train_batch_size, window=window, shuffle=True, **placed
        ),
        make_loader(held_out, collate, batch_size=eval_batch_size, shuffle=False, **placed),
    )


def first_rows(dataset: Dataset, most: int) -> Dataset:
    """`dataset`, cut to `most` rows where it has more, which the log then says: the first of each source, in proportion."""
    if len(dataset) > most:
        kept = first_of_each(dataset.rows, most)
        from_one = kept == list(range(most))
        logger.info(
            "evaluating on %s%d of %d held-out rows%s",
            "the first " if from_one else "",
            most,
            len(dataset),
            "" if from_one else ", the first of each source in proportion to its rows",
        )
        dataset.rows = Subset(dataset.rows, kept)
    return dataset
