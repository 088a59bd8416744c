"""Datasets and loaders built from the data options: all that a main needs."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import PreTrainedTokenizerBase

from dschat.config.options import DataOptions
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, truncation_report
from dschat.data.sources import Part, Source, load_source
from dschat.data.splits import Blend, first_indices_per_source, parse_shares, split_indices
from dschat.runtime import dist

logger = logging.getLogger(__name__)


class ShardedSampler(Sampler[int]):
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

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's rows of the epoch, beginning at `start`."""
        order = np.arange(self.num_rows)
        if self.shuffle:
            random_state = np.random.RandomState([self.seed & 0xFFFFFFFF, self.epoch])
            order = random_state.permutation(self.num_rows)
        shard = np.resize(order, self.total)[self.rank :: self.world_size]
        return iter(shard[self.start :].tolist())


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
    """Build the loader of one rank's batches.

    Call ``loader.sampler.set_epoch(epoch)`` before each pass.

    Items are tokenized on access, in the training process. That costs about a millisecond a row,
    far less than an update, while each worker process would be a fork of the whole trainer.

    Args:
        dataset: the rows of all ranks.
        collate: makes a batch of a list of items.
        batch_size: rows of a batch.
        rank: see `ShardedSampler`, as for `world_size`, `shuffle`, `seed` and `window`.
        world_size: the number of ranks.
        shuffle: permute in each epoch.
        seed: seed of the permutation.
        window: batches of one update.
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
    """Build the training and evaluation data of step 1.

    It is step 1's share of --data_path, and all of `sft_only_data_path`.

    Raises:
        ValueError: for data that cannot be used, rows without an answer, or a part that is empty.
    """
    train_rows, eval_rows = open_blends(data, step=1, needs="chosen", whole=sft_only_data_path)
    options = dict(
        max_seq_len=max_seq_len, prompt_format=data.prompt_format, end_token_id=end_token_id
    )
    train = SFTDataset(train_rows, tokenizer, **options)
    held_out = SFTDataset(eval_rows, tokenizer, **options)
    _log_truncation(train, held_out)
    return train, held_out


def build_pair_data(
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    end_token_id: int,
    cut_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[PairDataset, PairDataset]:
    """Build the training and evaluation data of step 2 and of DPO.

    Only training pairs are cut by `cut_fraction`, see `PairDataset`.

    Raises:
        ValueError: for data that cannot be used, rows without a rejected answer, or a part that is
            empty.
    """
    train_rows, eval_rows = open_blends(data, step=2, needs="rejected")
    options = dict(
        max_seq_len=max_seq_len, prompt_format=data.prompt_format, end_token_id=end_token_id
    )
    train = PairDataset(train_rows, tokenizer, cut_fraction=cut_fraction, seed=seed, **options)
    held_out = PairDataset(eval_rows, tokenizer, **options)
    _log_truncation(train, held_out)
    return train, held_out


def build_prompt_data(
    data: DataOptions, tokenizer: PreTrainedTokenizerBase, *, max_prompt_len: int
) -> tuple[PromptDataset, PromptDataset]:
    """Build the training and evaluation prompts of step 3.

    Raises:
        ValueError: for data that cannot be used, or a part that is empty.
    """
    train_rows, eval_rows = open_blends(data, step=3, needs="prompt")
    options = dict(max_prompt_len=max_prompt_len, prompt_format=data.prompt_format)
    train = PromptDataset(train_rows, tokenizer, **options)
    held_out = PromptDataset(eval_rows, tokenizer, **options)
    _log_truncation(train, held_out)
    return train, held_out


def open_blends(
    data: DataOptions, *, step: int, needs: str, whole: Sequence[str] = ()
) -> tuple[Blend, Blend]:
    """Open the training and evaluation rows of a step.

    Both parts are split by --data_split, so that no two steps share an evaluation row either.

    Args:
        data: the sources, and how they are split.
        step: 1, 2 or 3; gets its share of each source of --data_path.
        needs: "prompt", "chosen" or "rejected": the text that every row must have.
        whole: further sources, of which the step gets all rows.

    Raises:
        ValueError: for data that cannot be used; names the flag, the source and the row.
    """
    parse_shares(data.data_split)  # a malformed split fails before any data is read
    entries = [(path, False) for path in data.data_path] + [(path, True) for path in whole]
    pieces: dict[str, list[tuple[Source, Part]]] = {"train": [], "eval": []}
    num_all = {"train": 0, "eval": 0}
    for path, is_whole in entries:
        source = load_source(
            path,
            eval_fraction=data.eval_fraction,
            data_seed=data.data_seed,
            skip_bad_rows=data.skip_bad_rows,
            cache_dir=data.data_output_path,
        )
        counts = []
        for name, part in (("train", source.train), ("eval", source.eval)):
            num_all[name] += len(part)
            if not is_whole:
                indices = split_indices(
                    len(part), data.data_split, step=step, data_seed=data.data_seed
                )
                part = part.take(indices)
            part = _keep_rows_with(part, needs, step=step, skip=source.skip_bad_rows)
            pieces[name].append((source, part))
            counts.append(f"{len(part)} {name} rows")
        logger.info("step %d: %s: %s", step, path, ", ".join(counts))
    for name, found in pieces.items():
        if not any(len(part) for _, part in found):
            raise ValueError(
                f"--data_split {data.data_split} leaves step {step} no {name} row of --data_path "
                f"{' '.join(data.data_path)} (their {name} parts have {num_all[name]} rows in "
                f"all). Give step {step} a larger share, more rows, or a larger --eval_fraction."
            )
    return Blend(pieces["train"]), Blend(pieces["eval"])


def _keep_rows_with(part: Part, needs: str, *, step: int, skip: bool) -> Part:
    """Return the rows of `part` that have the text `needs`.

    Raises:
        ValueError: other rows exist, and `skip` is false.
    """
    missing = np.flatnonzero(~part.has[needs])
    if not len(missing):
        return part
    first = f'{part.place(missing[0])}: no "{needs}", which step {step} needs'
    if not skip:
        raise ValueError(
            f"{first}; {len(missing)} of the {len(part)} rows of its share lack it. Add it, take "
            "the set out of --data_path, or leave such rows out with --skip_bad_rows."
        )
    logger.warning("left out %d of %d rows: %s", len(missing), len(part), first)
    return part.take(np.flatnonzero(part.has[needs]))


def _log_truncation(train: Dataset, held_out: Dataset) -> None:
    """Log the size of both parts and how many rows are cut.

    This also renders rows of every source in both parts, so that a format they do not fit fails
    before any model loads.
    """
    for name, dataset in (("training", train), ("evaluation", held_out)):
        report = truncation_report(dataset, trained=dataset is train)
        logger.info("%s data: %d rows; %s", name, len(dataset), report)


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
    """Build this rank's loaders of a step.

    Training rows are shuffled and come in full windows; held-out rows keep their order.

    Args:
        train: training rows of all ranks.
        held_out: evaluation rows of all ranks.
        collate: ``collate_text``, ``collate_pairs`` or ``collate_prompts``.
        pad_id: the pad token.
        train_batch_size: rows of one training batch of one rank.
        eval_batch_size: rows of one evaluation batch of one rank.
        window: training batches per update (step 3: per rollout).
        seed: seed of the shuffling.

    Raises:
        ValueError: there are fewer training rows than one batch per rank.
    """
    least = dist.world_size() * train_batch_size
    if len(train) < least:
        raise ValueError(
            f"{len(train)} training rows are fewer than one batch per rank (world size "
            f"{dist.world_size()} x {train_batch_size} rows). Give more rows with --data_path, a "
            "larger share with --data_split, or a smaller --per_device_train_batch_size (step 3: "
            "--per_device_generation_batch_size)."
        )
    collate = functools.partial(collate, pad_id=pad_id)
    shard = dict(rank=dist.rank(), world_size=dist.world_size(), seed=seed)
    train_loader = make_loader(
        train, collate, batch_size=train_batch_size, window=window, shuffle=True, **shard
    )
    eval_loader = make_loader(held_out, collate, batch_size=eval_batch_size, shuffle=False, **shard)
    return train_loader, eval_loader


def first_rows(dataset: Dataset, most: int) -> Dataset:
    """Limit `dataset` to its first `most` rows, in place, and log it.

    The rows are the first of each source, in proportion to the sources' sizes.

    Returns:
        The same `dataset`.
    """
    if len(dataset) > most:
        kept = first_indices_per_source(dataset.rows, most)
        if kept == list(range(most)):
            logger.info("evaluating on the first %d of %d held-out rows", most, len(dataset))
        else:
            logger.info(
                "evaluating on %d of %d held-out rows, the first of each source in proportion to "
                "its rows",
                most,
                len(dataset),
            )
        dataset.rows = Subset(dataset.rows, kept)
    return dataset
