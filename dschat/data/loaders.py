"""Datasets and loaders built from the data options: all that a main needs."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase

from dschat.algorithms.grouping import group_by_length
from dschat.config.options import DataOptions, TextOptions
from dschat.config.sft import SFTData
from dschat.data.blends import epoch_draws, open_blends
from dschat.data.cache import prepared_folder
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, TextDataset
from dschat.data.packing import PackedDataset, collate_packed, collate_packed_pairs
from dschat.data.preparation import prepare
from dschat.data.row import Row
from dschat.data.samplers import PackedSampler, ShardedSampler
from dschat.data.splits import Blend, first_indices_per_source
from dschat.data.streams import Stream, StreamLoader
from dschat.data.tables import Table
from dschat.data.templates import HUMAN_ASSISTANT_TEMPLATE
from dschat.runtime import dist

logger = logging.getLogger(__name__)

MIN_HELD_OUT_PROMPTS = 2
# Tables of rows in memory, by the entry of --data_path that stands for them.
GivenTables: TypeAlias = Mapping[str, dict[str, Table]]


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
    draws: Sequence[tuple[int, int]] | None = None,
) -> DataLoader:
    """Build the loader of one rank's batches.

    Call ``loader.sampler.set_epoch(epoch)`` before each pass.

    Items are read from the prepared table in the training process. That costs some 50 microseconds
    a row, while each worker process would be a fork of the whole trainer.

    Args:
        dataset: the rows of all ranks.
        collate: makes a batch of a list of items.
        batch_size: rows of a batch.
        rank: see `ShardedSampler`, as for `world_size`, `shuffle`, `seed` and `window`.
        world_size: the number of ranks.
        shuffle: permute in each epoch.
        seed: seed of the permutation.
        window: batches of one update.
        draws: see `ShardedSampler`.
    """
    sampler = ShardedSampler(
        len(dataset),
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        window=window,
        shuffle=shuffle,
        seed=seed,
        draws=draws,
    )
    return DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate, num_workers=0
    )


def open_sft_rows(
    data: SFTData, *, given: GivenTables | None = None
) -> tuple[Stream | None, Sequence[Sequence[Row]]]:
    """Open the rows of step 1; these need no tokenizer.

    Returns:
        The stream if the rows are streamed, and the training and evaluation rows.

    Raises:
        ValueError: for data that cannot be used.
    """
    if data.streaming:
        stream = Stream(data, step=1, needs="chosen")
        return stream, stream.first_rows()
    whole = data.sft_only_data_path
    return None, open_blends(data, step=1, needs="chosen", whole=whole, given=given)


def open_pair_rows(
    data: TextOptions, *, given: GivenTables | None = None
) -> tuple[Stream | None, Sequence[Sequence[Row]]]:
    """Open the rows of step 2 and of DPO, as ``open_sft_rows`` does."""
    if data.streaming:
        stream = Stream(data, step=2, needs="rejected")
        return stream, stream.first_rows()
    return None, open_blends(data, step=2, needs="rejected", given=given)


def open_prompt_rows(
    data: DataOptions, *, given: GivenTables | None = None
) -> Sequence[Sequence[Row]]:
    """Open the training and evaluation rows of step 3, as ``open_sft_rows`` does."""
    return open_blends(data, step=3, needs="prompt", given=given)


def build_sft_data(
    data: SFTData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_token_id: int,
    given: GivenTables | None = None,
) -> tuple[SFTDataset, SFTDataset]:
    """Build the training and evaluation data of step 1.

    It is step 1's share of --data_path, and all of --sft_only_data_path. `given` is rows in memory,
    see ``open_blends``.

    Raises:
        ValueError: for data that cannot be used, rows without an answer, or a part that is empty.
    """
    stream, rows = open_sft_rows(data, given=given)
    options: dict[str, Any] = dict(
        max_seq_len=data.max_seq_len,
        prompt_format=data.prompt_format,
        end_token_id=end_token_id,
        truncation=data.truncation,
        train_on=data.train_on,
    )
    train, held_out = (SFTDataset(part, tokenizer, **options) for part in rows)
    _prepare_both(train, held_out, data)
    _attach(train, stream)
    return train, held_out


def build_pair_data(
    data: TextOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_token_id: int,
    cut_fraction: float = 0.0,
    seed: int = 0,
    given: GivenTables | None = None,
) -> tuple[PairDataset, PairDataset]:
    """Build the training and evaluation data of step 2 and of DPO.

    Only training pairs are cut by `cut_fraction`, see `PairDataset`. `given` is rows in memory, see
    ``open_blends``.

    Raises:
        ValueError: for data that cannot be used, rows without a rejected answer, or a part that is
            empty.
    """
    stream, (train_rows, eval_rows) = open_pair_rows(data, given=given)
    options: dict[str, Any] = dict(
        max_seq_len=data.max_seq_len,
        prompt_format=data.prompt_format,
        end_token_id=end_token_id,
        truncation=data.truncation,
    )
    train = PairDataset(train_rows, tokenizer, cut_fraction=cut_fraction, seed=seed, **options)
    held_out = PairDataset(eval_rows, tokenizer, **options)
    _prepare_both(train, held_out, data)
    _attach(train, stream)
    return train, held_out


def build_prompt_data(
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_len: int,
    given: GivenTables | None = None,
) -> tuple[PromptDataset, PromptDataset]:
    """Build the training and evaluation prompts of step 3.

    `given` is rows in memory, see ``open_blends``.

    Raises:
        ValueError: for data that cannot be used, a part that is empty, or a single held-out prompt.
    """
    rows = open_prompt_rows(data, given=given)
    options: dict[str, Any] = dict(
        max_prompt_len=max_prompt_len,
        prompt_format=data.prompt_format,
        truncation=data.truncation,
    )
    train, held_out = (PromptDataset(part, tokenizer, **options) for part in rows)
    _prepare_both(train, held_out, data)
    if len(held_out) < MIN_HELD_OUT_PROMPTS:
        raise ValueError(
            "step 3 takes the spread of scores over the held-out prompts, and there is "
            f"{len(held_out)}. Give more rows, a larger --eval_fraction, or an evaluation part."
        )
    return train, held_out


def _attach(train: TextDataset, stream: Stream | None) -> None:
    """Let a dataset, whose rows are the first of a stream, train on all of them."""
    if stream is not None:
        train.stream = stream
        train.items_digest = f"{train.items_digest} {stream.digest}"


def _prepare_both(train: TextDataset, held_out: TextDataset, data: DataOptions) -> None:
    """Tokenize both parts, and log what becomes of their rows.

    Raises:
        ValueError: rows that cannot be shown, or a part of which no row is left.
    """
    folder = prepared_folder(data.data_output_path)
    for name, dataset in (("training", train), ("evaluation", held_out)):
        report = prepare(
            dataset, cache_dir=folder, skip_bad_rows=data.skip_bad_rows, name=f"{name} data"
        )
        limit = f"{dataset.limit_flag} {dataset.limit}"
        if not report.kept:
            reasons = "; ".join(f"{count}: {why}" for why, count in report.left_out.items())
            raise ValueError(
                f"{limit}: no row of the {name} data is left ({reasons}). Give a larger "
                f"{dataset.limit_flag}, another --truncation, or other data."
            )
        logger.info("%s data: %s", name, report.describe(limit))
    if isinstance(train.rows, Blend):
        names = [source.name for source, _ in train.rows.pieces]
        train.draws = epoch_draws(
            names, train.rows.sizes, weights=data.blend, temperature=data.blend_temperature
        )
    _settle_template(train)


def _settle_template(dataset: TextDataset) -> None:
    """Give a tokenizer without a chat template the one that wrote its messages.

    Also log which token ends an answer if the chat template's is not the tokenizer's.
    """
    text_format = dataset.encoder.format
    tokenizer = dataset.tokenizer
    row = dataset.row(0)
    if not text_format.has_template and text_format.resolve(row) == "human_assistant":
        tokenizer.chat_template = HUMAN_ASSISTANT_TEMPLATE
        logger.info(
            "the tokenizer has no chat template: messages are written as Human and Assistant, and "
            "the model is saved with a template that writes them so"
        )
        return
    first = dataset.render(row)
    if not first.by_template or text_format.end_id == dataset.encoder.end_token_id:
        return
    end = tokenizer.eos_token
    if text_format.end_id is not None:
        end = tokenizer.convert_ids_to_tokens(text_format.end_id)
        logger.info(
            "the chat template ends a turn with %s and not with the tokenizer's %s: answers are "
            "trained, and end, with %s",
            end,
            tokenizer.eos_token,
            end,
        )
    elif text_format.end_lead:
        logger.info(
            "the chat template ends a turn with %r, which is no token of this vocabulary: it is "
            "learned as text, followed by %s",
            text_format.end_lead,
            end,
        )


def make_loaders(
    train: TextDataset,
    held_out: TextDataset,
    collate: Callable,
    *,
    pad_id: int,
    train_batch_size: int,
    eval_batch_size: int,
    window: int,
    seed: int,
    eval_iters: int | None = None,
    pack_to: int | None = None,
    tokens_per_batch: int = 0,
) -> tuple[DataLoader | StreamLoader, DataLoader]:
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
        eval_iters: evaluate on the rows of at most this many batches of each rank; None: on all.
        pack_to: tokens of a training row that holds several items, texts or pairs; None: one item
            a row.
        tokens_per_batch: above 0, a training batch has the rows of all batches of an update, which
            the trainer divides again; see ``group_by_length``.

    Raises:
        ValueError: there are fewer training rows than one batch per rank.
    """
    shard: dict[str, Any] = dict(rank=dist.rank(), world_size=dist.world_size(), seed=seed)
    padded = functools.partial(collate, pad_id=pad_id)
    if eval_iters is not None:
        held_out = first_rows(held_out, eval_iters * eval_batch_size * dist.world_size())
    eval_loader = make_loader(held_out, padded, batch_size=eval_batch_size, shuffle=False, **shard)
    if train.stream is not None:
        stream = StreamLoader(train, train.stream, padded, batch_size=train_batch_size, **shard)
        return stream, eval_loader
    _check_one_batch(len(train), train_batch_size)
    if tokens_per_batch:
        train_batch_size, window = train_batch_size * window, 1
    rows: dict[str, Any] = dict(batch_size=train_batch_size, window=window, **shard)
    if pack_to is None:
        train_loader = make_loader(train, padded, shuffle=True, draws=train.draws, **rows)
    else:
        train_loader = make_packed_loader(train, pad_id=pad_id, capacity=pack_to, **rows)
    logger.info(
        "training data: %.1f%% of the tokens of a batch are real, the rest is padding",
        100 * real_share(batch_lengths(train, train_loader, tokens_per_batch)),
    )
    return train_loader, eval_loader


def make_packed_loader(
    dataset: TextDataset,
    *,
    pad_id: int,
    capacity: int,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    window: int = 1,
) -> DataLoader:
    """Build the loader of one rank's batches of packed rows.

    Args:
        dataset: the items of all ranks, prepared.
        pad_id: the pad token.
        capacity: tokens of a row.
        batch_size: rows of a batch.
        rank: see `PackedSampler`, as for `world_size`, `seed` and `window`.
        world_size: the number of ranks.
        seed: seed of packing and shuffling.
        window: batches of one update.

    Raises:
        ValueError: there are fewer rows than one batch per rank.
    """
    is_pairs = isinstance(dataset, PairDataset)
    sampler = PackedSampler(
        dataset.lengths().sum(1),
        capacity=capacity,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        window=window,
        seed=seed,
        draws=dataset.draws,
    )
    logger.info(
        "--packing: %d %s in %d rows of up to %d tokens",
        len(dataset),
        "pairs" if is_pairs else "texts",
        sampler.num_rows,
        capacity,
    )
    _check_one_batch(sampler.num_rows, batch_size, kind="packed rows")
    collate = collate_packed_pairs if is_pairs else collate_packed
    return DataLoader(
        PackedDataset(dataset),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=functools.partial(collate, pad_id=pad_id),
        num_workers=0,
    )


def real_share(batches: Iterable[np.ndarray]) -> float:
    """Return the share of real tokens in batches, given the lengths [B, C] of their texts."""
    real = 0
    computed = 0
    for lengths in batches:
        real += int(lengths.sum())
        computed += lengths.size * int(lengths.max())
    return real / max(1, computed)


def batch_lengths(
    dataset: TextDataset, loader: DataLoader, tokens_per_batch: int
) -> Iterator[np.ndarray]:
    """Yield the lengths [B, C] of the texts of this rank's micro-batches in the first epoch."""
    lengths = dataset.lengths()
    rows = list(loader.sampler)
    for start in range(0, len(rows), loader.batch_size):
        batch = rows[start : start + loader.batch_size]
        if isinstance(loader.dataset, PackedDataset):
            yield np.array([[lengths[row].sum()] for row in batch])
        elif tokens_per_batch:
            yield from group_lengths(lengths[batch], tokens=tokens_per_batch)
        else:
            yield lengths[batch]


def group_lengths(lengths: np.ndarray, *, tokens: int) -> Iterator[np.ndarray]:
    """Yield the lengths of each micro-batch of --tokens_per_batch, given all rows' [B, C]."""
    for group in group_by_length(lengths.max(1).tolist(), tokens=tokens // lengths.shape[1]):
        yield lengths[group]


def _check_one_batch(num_rows: int, batch_size: int, *, kind: str = "training rows") -> None:
    """Raise ValueError if there are fewer rows than one batch per rank."""
    if num_rows < dist.world_size() * batch_size:
        raise ValueError(
            f"{num_rows} {kind} are fewer than one batch per rank (world size "
            f"{dist.world_size()} x {batch_size} rows). Give more rows with --data_path, a "
            "larger share with --data_split, or a smaller --per_device_train_batch_size (step 3: "
            "--per_device_generation_batch_size)."
        )


def first_rows(dataset: TextDataset, most: int) -> TextDataset:
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
        dataset.select(kept, Subset(dataset.rows, kept))
    return dataset
