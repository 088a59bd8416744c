"""Datasets and loaders built from the data options: all that a main needs."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import PreTrainedTokenizerBase

from dschat.config.options import DataOptions, TextOptions
from dschat.config.sft import SFTData
from dschat.data.blends import epoch_draws, open_blends
from dschat.data.cache import prepared_folder
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, TextDataset
from dschat.data.preparation import prepare
from dschat.data.splits import Blend, first_indices_per_source
from dschat.data.templates import HUMAN_ASSISTANT_TEMPLATE
from dschat.runtime import dist

logger = logging.getLogger(__name__)

MIN_HELD_OUT_PROMPTS = 2


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

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's rows of the epoch, beginning at `start`."""
        order = np.arange(self.num_rows)
        if self.shuffle:
            random_state = np.random.RandomState([self.seed & 0xFFFFFFFF, self.epoch])
            if self.draws is not None:
                order = _draw_rows(self.draws, random_state)
            order = random_state.permutation(order)
        shard = np.resize(order, self.total)[self.rank :: self.world_size]
        return iter(shard[self.start :].tolist())


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


def build_sft_data(
    data: SFTData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_token_id: int,
) -> tuple[SFTDataset, SFTDataset]:
    """Build the training and evaluation data of step 1.

    It is step 1's share of --data_path, and all of --sft_only_data_path.

    Raises:
        ValueError: for data that cannot be used, rows without an answer, or a part that is empty.
    """
    rows = open_blends(data, step=1, needs="chosen", whole=data.sft_only_data_path)
    options: dict[str, Any] = dict(
        max_seq_len=data.max_seq_len,
        prompt_format=data.prompt_format,
        end_token_id=end_token_id,
        truncation=data.truncation,
        train_on=data.train_on,
    )
    train, held_out = (SFTDataset(part, tokenizer, **options) for part in rows)
    _prepare_both(train, held_out, data)
    return train, held_out


def build_pair_data(
    data: TextOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
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
    options: dict[str, Any] = dict(
        max_seq_len=data.max_seq_len,
        prompt_format=data.prompt_format,
        end_token_id=end_token_id,
        truncation=data.truncation,
    )
    train = PairDataset(train_rows, tokenizer, cut_fraction=cut_fraction, seed=seed, **options)
    held_out = PairDataset(eval_rows, tokenizer, **options)
    _prepare_both(train, held_out, data)
    return train, held_out


def build_prompt_data(
    data: DataOptions, tokenizer: PreTrainedTokenizerBase, *, max_prompt_len: int
) -> tuple[PromptDataset, PromptDataset]:
    """Build the training and evaluation prompts of step 3.

    Raises:
        ValueError: for data that cannot be used, a part that is empty, or a single held-out prompt.
    """
    rows = open_blends(data, step=3, needs="prompt")
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
    shard: dict[str, Any] = dict(rank=dist.rank(), world_size=dist.world_size(), seed=seed)
    train_loader = make_loader(
        train,
        collate,
        batch_size=train_batch_size,
        window=window,
        shuffle=True,
        draws=train.draws,
        **shard,
    )
    eval_loader = make_loader(held_out, collate, batch_size=eval_batch_size, shuffle=False, **shard)
    return train_loader, eval_loader


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
