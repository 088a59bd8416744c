"""The rows of a step: its share of every source, and what is held out for evaluation."""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from dschat.config.options import DataOptions
from dschat.data.forms import Reading
from dschat.data.sources import Part, Source, describe_columns, describe_forms, load_source
from dschat.data.splits import (
    HOLD_OUT_SALT,
    SPLIT_SALT,
    Assignment,
    Blend,
    parse_shares,
    share_sizes,
)
from dschat.data.tables import Table

logger = logging.getLogger(__name__)

# Which part of a dataset with several training parts (train_sft, train_prefs, ...) a step takes.
PREFERRED_PARTS = {1: ("sft", "gen"), 2: ("prefs", "preference"), 3: ("gen", "prefs", "sft")}


def open_blends(
    data: DataOptions,
    *,
    step: int,
    needs: str,
    whole: Sequence[str] = (),
    given: Mapping[str, dict[str, Table]] | None = None,
) -> tuple[Blend, Blend]:
    """Open the training and evaluation rows of a step.

    Rows that begin with the same message of the user stay together: they are in one step, and
    either in training or in evaluation, over all sources.

    Args:
        data: the sources, and how they are split.
        step: 1, 2 or 3; gets its share of each source of --data_path.
        needs: "prompt", "chosen" or "rejected": the text that every row must have.
        whole: further sources, of which the step gets all rows.
        given: tables of rows in memory, by the entry of --data_path that stands for them.

    Raises:
        ValueError: for data that cannot be used; names the flag, the source and the row.
    """
    shares = parse_shares(data.data_split)  # a malformed split fails before any data is read
    reading = make_reading(data, step=step)
    paths = [*data.data_path, *whole]
    sources = [
        load_source(
            path,
            reading=reading,
            skip_bad_rows=data.skip_bad_rows,
            config=data.dataset_config,
            split=data.dataset_split,
            prefer=PREFERRED_PARTS[step],
            cache_dir=data.data_output_path,
            given=(given or {}).get(path),
        )
        for path in paths
    ]
    parts = hold_out(sources, eval_fraction=data.eval_fraction, seed=data.data_seed)
    steps = Assignment(data.data_seed, SPLIT_SALT)
    train_pieces, eval_pieces = [], []
    num_all = np.zeros(2, dtype=np.int64)
    for number, (source, (train, held_out)) in enumerate(zip(sources, parts, strict=True)):
        num_all += len(train), len(held_out)
        if number < len(data.data_path):
            train, held_out = _share(steps, train, held_out, shares, step)
        train = _keep_rows_with(train, needs, step=step, skip=source.skip_bad_rows)
        held_out = _keep_rows_with(held_out, needs, step=step, skip=source.skip_bad_rows)
        train_pieces.append((source, train))
        eval_pieces.append((source, held_out))
        _log_source(source, train, held_out, step=step)
    for name, pieces, count in zip(
        ("train", "eval"), (train_pieces, eval_pieces), num_all, strict=True
    ):
        if not any(len(part) for _, part in pieces):
            raise ValueError(
                f"--data_split {data.data_split} leaves step {step} no {name} row of --data_path "
                f"{' '.join(data.data_path)} (their {name} parts have {count} rows in all). Give "
                f"step {step} a larger share, more rows, or a larger --eval_fraction."
            )
    return Blend(train_pieces), Blend(eval_pieces)


def make_reading(data: DataOptions, *, step: int) -> Reading:
    """Return how raw rows are read; only step 2 makes several pairs of one row."""
    columns = {
        "prompt": data.prompt_key,
        "response": data.response_key,
        "chosen": data.chosen_key,
        "rejected": data.rejected_key,
        "messages": data.messages_key,
        "system": data.system_key,
        "label": data.label_key,
    }
    named = {name: value for name, value in columns.items() if value is not None}
    pairs = data.pairs if step == 2 else "best_worst"
    return Reading(
        columns=named,
        pairs=pairs,
        bare_text="prompt" if step == 3 else "chosen",
        min_margin=data.min_margin if step == 2 else 0.0,
    )


def hold_out(
    sources: Sequence[Source], *, eval_fraction: float, seed: int
) -> list[tuple[Part, Part]]:
    """Return the training and evaluation rows of each source.

    A source with an evaluation part keeps it; of the others a share is held out. Training rows that
    begin like an evaluation row of any source are left out, and counted.

    Raises:
        ValueError: a source too small to be split.
    """
    held_out = Assignment(seed, HOLD_OUT_SALT)
    published = [source.eval.group for source in sources if source.eval is not None]
    if published:
        held_out.fix(np.concatenate(published), label=1)
    parts = []
    for source in sources:
        train, evaluation = source.train, source.eval
        if evaluation is None:
            wanted = _eval_shares(train, eval_fraction)
            is_eval = held_out.assign(train.group, wanted).astype(bool)
            evaluation = train.take(np.flatnonzero(is_eval))
            train = train.take(np.flatnonzero(~is_eval))
            if not len(train) or not len(evaluation):
                raise ValueError(
                    f"{source.name}: all its {len(source.train)} rows begin with the same message, "
                    "so none can be held out. Give more rows, or an eval.* file."
                )
        parts.append((train, evaluation))
    return [
        (_drop_common(source, train, parts), evaluation)
        for source, (train, evaluation) in zip(sources, parts, strict=True)
    ]


def epoch_draws(
    names: Sequence[str], sizes: Sequence[int], *, weights: Sequence[float], temperature: float
) -> list[tuple[int, int]] | None:
    """Return how many rows of each source an epoch draws, or None if each row comes once.

    An epoch has as many rows as all sources together.

    Args:
        names: the sources, for the log and for messages.
        sizes: their rows.
        weights: the share of each source in an epoch; empty: its rows.
        temperature: above 1, small sources are drawn more often: the shares are raised to the power
            of 1 / temperature.

    Raises:
        ValueError: not one weight for each source.
    """
    if weights and len(weights) != len(sizes):
        raise ValueError(
            f"--blend has {len(weights)} weights, and there are {len(sizes)} data sets "
            f"({', '.join(names)}). Give one for each, in this order."
        )
    if not weights and temperature == 1:
        return None
    powers = [float(value) ** (1 / temperature) for value in weights or sizes]
    powers = [power if size else 0.0 for power, size in zip(powers, sizes, strict=True)]
    counts = share_sizes(sum(sizes), [Fraction(power) for power in powers])
    for name, size, count in zip(names, sizes, counts, strict=True):
        logger.info(
            "%s: %d rows of an epoch, %.2f passes over its %d",
            name,
            count,
            count / max(1, size),
            size,
        )
    return list(zip(sizes, counts, strict=True))


def _eval_shares(part: Part, eval_fraction: float) -> list[Fraction]:
    if len(part) < 2:
        raise ValueError(
            f"{part.table.title}: one row cannot be split into training and evaluation. Give more "
            "rows, or an eval.* file."
        )
    if not 0 < eval_fraction < 1:
        raise ValueError(
            f"--eval_fraction {eval_fraction}: give a share between 0 and 1, such as 0.1."
        )
    num_eval = min(len(part) - 1, max(1, round(len(part) * eval_fraction)))
    return [Fraction(len(part) - num_eval), Fraction(num_eval)]


def _drop_common(source: Source, train: Part, parts: Sequence[tuple[Part, Part]]) -> Part:
    """Leave out training rows that begin like an evaluation row."""
    held_out = np.unique(np.concatenate([evaluation.group for _, evaluation in parts]))
    common = np.isin(train.group, held_out)
    if not common.any():
        return train
    if common.all():
        logger.warning(
            "%s: every training row begins like an evaluation row, so they are kept: evaluation "
            "shows what was trained",
            source.name,
        )
        return train
    logger.warning(
        "%s: left out %d of %d training rows, which begin like an evaluation row",
        source.name,
        int(common.sum()),
        len(train),
    )
    return train.take(np.flatnonzero(~common))


def _share(
    steps: Assignment, train: Part, held_out: Part, shares: Sequence[Fraction], step: int
) -> tuple[Part, Part]:
    """Return the rows of both parts that belong to `step`."""
    mine = [steps.assign(part.group, shares) == step - 1 for part in (train, held_out)]
    return train.take(np.flatnonzero(mine[0])), held_out.take(np.flatnonzero(mine[1]))


def _keep_rows_with(part: Part, needs: str, *, step: int, skip: bool) -> Part:
    """Return the rows of `part` that have the text `needs`.

    Raises:
        ValueError: other rows exist, and `skip` is false.
    """
    missing = np.flatnonzero(~part.has[needs])
    if not len(missing):
        return part
    first = f'{part.place(int(missing[0]))}: no "{needs}", which step {step} needs'
    if not skip:
        raise ValueError(
            f"{first}; {len(missing)} of the {len(part)} rows of its share lack it. Add it, name "
            f"its column with --{needs}_key, take the set out of --data_path, or leave such rows "
            "out with --skip_bad_rows."
        )
    logger.warning("left out %d of %d rows: %s", len(missing), len(part), first)
    return part.take(np.flatnonzero(part.has[needs]))


def _log_source(source: Source, train: Part, held_out: Part, *, step: int) -> None:
    logger.info(
        "step %d: %s (%s): %d train rows, %d eval rows",
        step,
        source.name,
        describe_forms(source),
        len(train),
        len(held_out),
    )
    columns = describe_columns(source.train)
    if columns and step != 3:  # step 3 gives them to --reward_fn
        logger.info("%s: columns that are not used: %s", source.name, columns)
