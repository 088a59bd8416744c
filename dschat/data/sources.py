"""Datasets by path or name: local files, folders, folders of datasets.save_to_disk, and the hub.

Every row is checked once, when the dataset is opened. A bad row thus stops a run before any model
loads, and the rows left out do not depend on the step: all steps split the same rows.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from dschat.data.hub_sets import HUB_SETS, HubSet, local_json_row
from dschat.data.row import Row, RowFunction, row_from_columns
from dschat.data.tables import LOCAL_JSON, Fault, Table, format_error, open_tables, parse_entry

logger = logging.getLogger(__name__)

# The errors of a row function over fields that are missing, null or of another type.
ROW_FAULTS = (ValueError, KeyError, TypeError, IndexError, AttributeError)
FAULTS_SHOWN = 5
# Makes the hold-out's permutation differ from that of the split, which has the same seed.
HOLD_OUT_SALT = 1


@dataclass(frozen=True)
class Part:
    """Rows of one table, a sequence of raw rows (dictionaries)."""

    table: Table
    index: np.ndarray  # [N] int64, which rows of the table, in order
    # "prompt", "chosen" and "rejected": [N] bool, True if the row has that text
    has: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def __getitem__(self, position: int) -> dict:
        """Return the raw row at `position`."""
        return self.table.rows[int(self.index[position])]

    def place(self, position: int) -> str:
        """Return a row's place for messages: "rows.jsonl, line 7" or "name (train), row 7"."""
        return self.table.place(int(self.index[position]))

    def take(self, positions: Sequence[int]) -> "Part":
        """Return the rows at `positions` as a new part of the same table."""
        positions = np.asarray(positions, dtype=np.int64)
        has = {name: flags[positions] for name, flags in self.has.items()}
        return replace(self, index=self.index[positions], has=has)


@dataclass(frozen=True)
class Source:
    """A dataset: two parts without a common row, and the function that reads a raw row."""

    name: str
    train: Part
    eval: Part
    row_function: RowFunction
    skip_bad_rows: bool

    def row(self, raw: dict, *, place: str = "") -> Row:
        """Read a raw row; raise ValueError, beginning with `place`, if it is malformed."""
        try:
            return replace(self.row_function(raw), place=place)
        except ROW_FAULTS as error:
            raise ValueError(f"{place or self.name}: {format_error(error)}") from error


def load_source(
    path: str,
    *,
    eval_fraction: float,
    data_seed: int,
    skip_bad_rows: bool = False,
    config: str | None = None,
    split: str | None = None,
    prefer: tuple[str, ...] = (),
    cache_dir: str | None = None,
) -> Source:
    """Open one entry of --data_path.

    A local path takes precedence over a hub name. A dataset of ``hub_sets.HUB_SETS`` is recognized
    by its exact name, and a local copy of it by a path that ends with that name.

    Args:
        path: a .json, .jsonl, .csv or .parquet file; a folder with train.* (and eval.*, test.* or
            validation.*) of these; a folder of datasets.save_to_disk; a hub name; or
            local/jsonfile, which stands for data/train.json and data/eval.json in the working
            directory.
        eval_fraction: share of the training rows to hold out, at least one row, if the dataset has
            no evaluation part.
        data_seed: seed of the choice of held-out rows.
        skip_bad_rows: leave malformed rows out and log their number, instead of raising.
        config: configuration of a hub dataset whose entry names none.
        split: part to train on, if the entry names none.
        prefer: see `tables.open_tables`.
        cache_dir: folder for downloads from the hub; None: that of the datasets library.

    Raises:
        ValueError: for anything that cannot be used; names the file and line or the dataset and
            row, and the remedy.
    """
    entry = parse_entry(path)
    hub_set = _find_hub_set(entry.path)
    row_function = hub_set.row_function if hub_set else row_from_columns
    if path == LOCAL_JSON:
        row_function = local_json_row
    tables = open_tables(
        entry.path,
        repository=hub_set.repository if hub_set else None,
        config=entry.config or (hub_set.config if hub_set else None) or config,
        split=entry.split or split,
        prefer=prefer,
        cache_dir=cache_dir,
    )
    # Users cannot fix a published set, and the known ones have a few rows without a usable answer.
    skip = skip_bad_rows or hub_set is not None
    parts = {name: _check_table(table, row_function, skip=skip) for name, table in tables.items()}
    if "eval" not in parts:
        parts["train"], parts["eval"] = _hold_out(
            parts["train"], eval_fraction=eval_fraction, data_seed=data_seed
        )
    return Source(
        name=path,
        train=parts["train"],
        eval=parts["eval"],
        row_function=row_function,
        skip_bad_rows=skip,
    )


def _find_hub_set(path: str) -> HubSet | None:
    """Return the known dataset with the name `path`, or whose name is the end of `path`."""
    parts = Path(path).parts
    names = (path, "/".join(parts[-2:]), "".join(parts[-1:]))
    return next((HUB_SETS[name] for name in names if name in HUB_SETS), None)


def _check_table(table: Table, row_function: RowFunction, *, skip: bool) -> Part:
    """Return all good rows of a table; raise ValueError for others, or leave them out if `skip`."""
    faults = table.faults
    good = []
    has = {"prompt": [], "chosen": [], "rejected": []}
    for number, raw in enumerate(_iterate_rows(table.rows)):
        try:
            row = row_function(raw)
        except ROW_FAULTS as error:
            faults.append(table.fault(number, format_error(error)))
            continue
        good.append(number)
        has["prompt"].append(bool(row.prompt))
        has["chosen"].append(bool(row.chosen))
        has["rejected"].append(bool(row.rejected))
    if faults and (not skip or not good or table.lost_after is not None):
        raise ValueError(_format_faults(table, sorted(faults), all_bad=not good))
    if faults:
        logger.warning(
            "left out %d bad rows of %d; the first: %s",
            len(faults),
            len(faults) + len(good),
            min(faults),
        )
    if not good:
        raise ValueError(
            f"{table.title}: no rows in it. Give at least one, or take it out of --data_path."
        )
    return Part(
        table=table,
        index=np.array(good, dtype=np.int64),
        has={name: np.array(flags, dtype=bool) for name, flags in has.items()},
    )


def _iterate_rows(rows: Sequence) -> Iterator[dict]:
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    # In batches: reading an Arrow table one row at a time is twenty times as slow.
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _format_faults(table: Table, faults: list[Fault], *, all_bad: bool) -> str:
    """Format the first faults, what a row needs, and the remedy."""
    shown = [str(fault) for fault in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        shown.append(f"... and {len(faults) - FAULTS_SHOWN} more.")
    if table.lost_after is not None:
        remedy = (
            f"The rows after {table.lost_after} cannot be told apart, so --skip_bad_rows "
            "cannot leave out the bad one. Fix that line."
        )
    elif all_bad:
        remedy = "No row here is usable."
    else:
        remedy = "Fix the rows, or leave them out with --skip_bad_rows."
    shown.append(
        'A row needs "prompt" (a string or messages) with "chosen" or "response", or it needs '
        f'"messages"; pairs need "rejected" too. {remedy}'
    )
    return "\n".join(shown)


def _hold_out(part: Part, *, eval_fraction: float, data_seed: int) -> tuple[Part, Part]:
    """Split a part at random into training and evaluation rows, each in their own order."""
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
    # RandomState's streams are frozen; those of numpy's and torch's newer generators may change.
    order = np.random.RandomState([data_seed & 0xFFFFFFFF, HOLD_OUT_SALT]).permutation(len(part))
    return part.take(np.sort(order[num_eval:])), part.take(np.sort(order[:num_eval]))
