"""Datasets by path or name: local files, folders, folders of datasets.save_to_disk, and the hub.

Every row is checked once, when the dataset is opened. A bad row thus stops a run before any model
loads, and the rows left out do not depend on the step: all steps split the same rows.
"""

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

from dschat.data.hub_sets import HUB_SETS, HubSet, local_json_row
from dschat.data.readers import read_records
from dschat.data.row import Row, RowFunction, row_from_columns
from dschat.runtime.paths import user_path

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
EVAL_NAMES = ("eval", "test", "validation", "valid", "dev")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The errors of a row function over fields that are missing, null or of another type.
ROW_FAULTS = (ValueError, KeyError, TypeError, IndexError, AttributeError)
FAULTS_SHOWN = 5
# Makes the hold-out's permutation differ from that of the split, which has the same seed.
HOLD_OUT_SALT = 1


@dataclass(frozen=True)
class Part:
    """Rows of one table, a sequence of raw rows (dictionaries)."""

    table: Sequence  # list of dict, or a memory-mapped datasets.Dataset
    index: np.ndarray  # [N] int64, which rows of the table, in order
    # "prompt", "chosen" and "rejected": [N] bool, True if the row has that text
    has: dict[str, np.ndarray]
    title: str
    # The line of each row of the table; None: messages give the row's number, counted from 1.
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def __getitem__(self, position: int) -> dict:
        """Return the raw row at `position`."""
        return self.table[int(self.index[position])]

    def place(self, position: int) -> str:
        """Return a row's place for messages: "rows.jsonl, line 7" or "name (train), row 7"."""
        number = int(self.index[position])
        if self.lines is None:
            return f"{self.title}, row {number + 1}"
        return f"{self.title}, line {self.lines[number]}"

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
            raise ValueError(f"{place or self.name}: {_format_error(error)}") from error


@dataclass(frozen=True)
class _Table:
    rows: Sequence
    title: str
    lines: Sequence[int] | None = None
    faults: tuple = ()  # (line, message) of what could not be read
    lost_after: int | None = None  # the line after which rows cannot be told from one another


def load_source(
    path: str,
    *,
    eval_fraction: float,
    data_seed: int,
    skip_bad_rows: bool = False,
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
        cache_dir: folder for downloads from the hub; None: that of the datasets library.

    Raises:
        ValueError: for anything that cannot be used; names the file and line or the dataset and
            row, and the remedy.
    """
    hub_set = _find_hub_set(path)
    row_function = hub_set.row_function if hub_set else row_from_columns
    if path == "local/jsonfile":
        row_function = local_json_row
        tables = _open_folder(Path("data"), cache_dir, suffixes=(".json",))
    else:
        tables = _open_tables(path, hub_set or HubSet(row_from_columns), cache_dir)
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


def _open_tables(path: str, hub_set: HubSet, cache_dir: str | None) -> dict[str, _Table]:
    local = user_path(path)
    if _exists(local, path):
        if not local.is_file() and not local.is_dir():
            raise ValueError(
                f"--data_path {path}: neither a file nor a folder. Give a file or a folder."
            )
        return _open_local(local, cache_dir)
    looks_local = path.startswith((".", "/", "~")) or path.endswith(SUFFIXES)
    if looks_local or not HUB_NAME.fullmatch(path):
        raise ValueError(
            f"--data_path {path}: no such file or folder, and not a possible hub name. Give a path "
            "that exists, or a name such as owner/name."
        )
    return _open_hub_set(path, hub_set, cache_dir)


def _exists(local: Path, path: str) -> bool:
    try:
        return local.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise ValueError(
            f"--data_path {path}: {error.strerror}. Give a path that exists, or a name such as "
            "owner/name."
        ) from error


def _open_local(path: Path, cache_dir: str | None) -> dict[str, _Table]:
    if path.is_file():
        return {"train": _open_file(path, cache_dir)}
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _open_folder(path, cache_dir)
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(
            f"{path}: not readable as a folder of datasets.save_to_disk: {_format_error(error)}"
        ) from error
    return _select_parts(stored, str(path))


def _open_folder(
    folder: Path, cache_dir: str | None, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, _Table]:
    tables = {}
    for part, stems in (("train", ("train",)), ("eval", EVAL_NAMES)):
        files = [folder / (stem + suffix) for stem in stems for suffix in suffixes]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{folder}: {names} are both its {part} part; keep one.")
        if files:
            tables[part] = _open_file(files[0], cache_dir)
    if "train" not in tables:
        raise ValueError(
            f"{folder}: no train{'|'.join(suffixes)} in this folder, and no dataset_dict.json of "
            "datasets.save_to_disk. Give a file, or a folder that holds train.* and eval.*."
        )
    return tables


def _open_file(path: Path, cache_dir: str | None) -> _Table:
    if path.suffix != ".parquet":
        records = read_records(path)
        return _Table(
            rows=records.rows,
            title=str(path),
            lines=records.lines,
            faults=tuple(records.faults),
            lost_after=records.lost_after,
        )
    try:
        # The library makes no table of a file without rows.
        if not pyarrow.parquet.read_metadata(path).num_rows:
            return _Table([], str(path))
        # The library reads the path as a pattern, and takes the size of the first row group as its
        # batch size, which may be 0.
        pattern = glob.escape(str(path))
        table = datasets.Dataset.from_parquet(pattern, cache_dir=cache_dir, batch_size=1000)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = _format_error(error.__cause__ or error)
        raise ValueError(f"{path}: not readable as Parquet: {reason}") from error
    return _Table(table, str(path))


def _open_hub_set(name: str, hub_set: HubSet, cache_dir: str | None) -> dict[str, _Table]:
    repository = hub_set.repository or name
    logger.info("%s: opening from the hub", name)
    try:
        stored = _load_from_hub(repository, hub_set.config, cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"--data_path {name}: no such file or folder here, and loading it from the hub failed "
            f"({_format_error(error)}). Give a {', '.join(SUFFIXES)} file, or a folder that holds "
            "train.* and eval.*. If another machine reaches the hub, write a copy there with "
            f"datasets.save_to_disk, into a folder whose path ends with {name}, and give that."
        ) from error
    return _select_parts(stored, name)


def _load_from_hub(
    repository: str, config: str | None, cache_dir: str | None
) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_dataset(repository, config, cache_dir=cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # The hub converts datasets with a loading script; the converted files are on this branch.
        return datasets.load_dataset(
            repository, data_dir=config, revision="refs/convert/parquet", cache_dir=cache_dir
        )


def _select_parts(stored: datasets.Dataset | datasets.DatasetDict, title: str) -> dict[str, _Table]:
    # save_to_disk keeps a format, with which rows may not be dictionaries of plain values.
    stored = stored.with_format(None)
    if isinstance(stored, datasets.Dataset):
        return {"train": _Table(stored, title)}
    train = "train"
    if train not in stored and len(stored) == 1:
        train = next(iter(stored))
    if train not in stored:
        raise ValueError(
            f"{title}: its parts are {', '.join(stored)}, and none is called train. Save the part "
            "to train on alone."
        )
    tables = {"train": _Table(stored[train], f"{title} ({train})")}
    for name in EVAL_NAMES:
        if name in stored and name != train:
            tables["eval"] = _Table(stored[name], f"{title} ({name})")
            break
    return tables


def _check_table(table: _Table, row_function: RowFunction, *, skip: bool) -> Part:
    """Return all good rows of a table; raise ValueError for others, or leave them out if `skip`."""
    faults = list(table.faults)
    good = []
    has = {"prompt": [], "chosen": [], "rejected": []}
    for number, raw in enumerate(_iterate_rows(table.rows)):
        try:
            row = row_function(raw)
        except ROW_FAULTS as error:
            line = number + 1 if table.lines is None else table.lines[number]
            faults.append((line, _format_error(error)))
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
            _format_fault(table, *min(faults)),
        )
    if not good:
        raise ValueError(
            f"{table.title}: no rows in it. Give at least one, or take it out of --data_path."
        )
    return Part(
        table=table.rows,
        index=np.array(good, dtype=np.int64),
        has={name: np.array(flags, dtype=bool) for name, flags in has.items()},
        title=table.title,
        lines=table.lines,
    )


def _iterate_rows(rows: Sequence) -> Iterator[dict]:
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    # In batches: reading an Arrow table one row at a time is twenty times as slow.
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _format_faults(table: _Table, faults: list[tuple[int, str]], *, all_bad: bool) -> str:
    """Format the first faults, what a row needs, and the remedy."""
    shown = [_format_fault(table, line, message) for line, message in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        shown.append(f"... and {len(faults) - FAULTS_SHOWN} more.")
    if table.lost_after is not None:
        remedy = (
            f"The rows after line {table.lost_after} cannot be told apart, so --skip_bad_rows "
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


def _format_fault(table: _Table, line: int, message: str) -> str:
    unit = "row" if table.lines is None else "line"
    return f"{table.title}, {unit} {line}: {message}."


def _format_error(error: BaseException) -> str:
    """Format an error as one line without its final full stop."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(".")[:500]


def _hold_out(part: Part, *, eval_fraction: float, data_seed: int) -> tuple[Part, Part]:
    """Split a part at random into training and evaluation rows, each in their own order."""
    if len(part) < 2:
        raise ValueError(
            f"{part.title}: one row cannot be split into training and evaluation. Give more rows, "
            "or an eval.* file."
        )
    if not 0 < eval_fraction < 1:
        raise ValueError(
            f"--eval_fraction {eval_fraction}: give a share between 0 and 1, such as 0.1."
        )
    num_eval = min(len(part) - 1, max(1, round(len(part) * eval_fraction)))
    # RandomState's streams are frozen; those of numpy's and torch's newer generators may change.
    order = np.random.RandomState([data_seed & 0xFFFFFFFF, HOLD_OUT_SALT]).permutation(len(part))
    return part.take(np.sort(order[num_eval:])), part.take(np.sort(order[:num_eval]))
