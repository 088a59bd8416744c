"""A data set by its path or name: local files and folders, folders of datasets.save_to_disk, the hub.

Every row is checked once, when the data set is opened, so that a bad one stops a run before any model loads, and
so that the rows left out do not depend on the step: all steps split the same rows.
"""

import glob
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Optional, Sequence

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
# What a row function may raise over fields that are missing, null or of another type.
ROW_FAULTS = (ValueError, KeyError, TypeError, IndexError, AttributeError)
FAULTS_SHOWN = 5
HOLD_OUT_SALT = (
    1  # parts the hold-out's permutation from that of the split, which has the same seed
)


@dataclass(frozen=True)
class Part:
    """Rows of one table, a sequence of raw rows (dictionaries)."""

    table: Sequence  # list of dict, or a memory-mapped datasets.Dataset
    index: np.ndarray  # [N] int64, which rows of the table, in order
    has: dict[
        str, np.ndarray
    ]  # "prompt", "chosen", "rejected": [N] bool, True where the row has such a text
    title: str
    lines: Optional[Sequence[int]] = (
        None  # the line of each row of the table; None: rows count from 1
    )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict:
        return self.table[int(self.index[position])]

    def place(self, position: int) -> str:
        """Where a row stands, for messages: "rows.jsonl, line 7" or "name (train), row 7"."""
        number = int(self.index[position])
        return (
            f"{self.title}, row {number + 1}"
            if self.lines is None
            else f"{self.title}, line {self.lines[number]}"
        )

    def take(self, positions: Sequence[int]) -> "Part":
        """The rows at `positions`, as a new part of the same table."""
        at = np.asarray(positions, dtype=np.int64)
        return replace(
            self, index=self.index[at], has={name: flags[at] for name, flags in self.has.items()}
        )


@dataclass(frozen=True)
class Source:
    """A data set: two parts without a common row, and how a raw row reads."""

    name: str
    train: Part
    eval: Part
    row_of: RowFunction
    skip_bad_rows: bool

    def row(self, raw: dict, *, place: str = "") -> Row:
        """The row of `raw`; a ValueError that begins with `place` if it is malformed."""
        try:
            return replace(self.row_of(raw), place=place)
        except ROW_FAULTS as error:
            raise ValueError(f"{place or self.name}: {_words(error)}") from error


@dataclass(frozen=True)
class _Table:
    rows: Sequence
    title: str
    lines: Optional[Sequence[int]] = None
    faults: tuple = ()  # (line, message) of what could not be read at all
    lost_behind: Optional[int] = None  # the line behind which rows cannot be told from one another


def load_source(
    path: str,
    *,
    eval_fraction: float,
    data_seed: int,
    skip_bad_rows: bool = False,
    cache_dir: Optional[str] = None,
) -> Source:
    """Open one entry of --data_path.

    A local path goes before a name of the hub. A data set with a row function of its own (``hub.HUB_SETS``) is known
    by its exact name, as is a local copy whose path ends with that name.

    Args:
        path: a .json, .jsonl, .csv or .parquet file; a folder with train.* (and eval.*, test.* or validation.*) of
            these; a folder of datasets.save_to_disk; a name of the hub; or local/jsonfile, which stands for
            data/train.json and data/eval.json in the working directory.
        eval_fraction: share of the training rows held out, at least one row, where the set has no evaluation part.
        data_seed: seed of that choice.
        skip_bad_rows: leave malformed rows out, and log how many, instead of raising.
        cache_dir: the folder that keeps what the hub sends; None: that of the datasets library.

    Raises:
        ValueError: for anything that cannot be used, naming the file and line or the set and row, and the remedy.
    """
    known = _known_set(path)
    row_of = known.row_of if known else row_from_columns
    if path == "local/jsonfile":
        row_of = local_json_row
        tables = _folder(Path("data"), cache_dir, suffixes=(".json",))
    elif _exists(local := user_path(path), path) and not local.is_file() and not local.is_dir():
        raise ValueError(f"--data_path {path}: neither a file nor a folder. Give one of these.")
    elif _exists(local, path):
        tables = _local(local, cache_dir)
    elif (
        path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or not HUB_NAME.fullmatch(path)
    ):
        raise ValueError(
            f"--data_path {path}: no such file or folder, and no name that the hub could know. Give a path that exists, "
            "or a name such as owner/name."
        )
    else:
        tables = _hub(path, known or HubSet(row_from_columns), cache_dir)
    # Nobody here can mend a published set, and the known ones have a few rows without a usable answer.
    skip = skip_bad_rows or known is not None
    parts = {name: _checked(table, row_of, skip=skip) for name, table in tables.items()}
    if "eval" not in parts:
        parts["train"], parts["eval"] = _hold_out(
            parts["train"], eval_fraction=eval_fraction, data_seed=data_seed
        )
    return Source(
        name=path, train=parts["train"], eval=parts["eval"], row_of=row_of, skip_bad_rows=skip
    )


def _known_set(path: str) -> Optional[HubSet]:
    parts = Path(path).parts
    names = (path, "/".join(parts[-2:]), "".join(parts[-1:]))
    return next((HUB_SETS[name] for name in names if name in HUB_SETS), None)


def _exists(local: Path, path: str) -> bool:
    try:
        return local.exists()
    except OSError as error:  # names that are too long, folders that may not be looked into
        raise ValueError(
            f"--data_path {path}: {error.strerror}. Give a path that exists, or a name such as owner/name."
        ) from error


def _local(path: Path, cache_dir: Optional[str]) -> dict[str, _Table]:
    if path.is_file():
        return {"train": _file(path, cache_dir)}
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _folder(path, cache_dir)
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise any of many kinds
        raise ValueError(
            f"{path}: not readable as a folder of datasets.save_to_disk: {_words(error)}"
        ) from error
    return _named_parts(stored, str(path))


def _folder(
    folder: Path, cache_dir: Optional[str], suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, _Table]:
    tables = {}
    for part, stems in (("train", ("train",)), ("eval", EVAL_NAMES)):
        files = [folder / (stem + suffix) for stem in stems for suffix in suffixes]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{folder}: {names} are both its {part} part; keep one.")
        if files:
            tables[part] = _file(files[0], cache_dir)
    if "train" not in tables:
        raise ValueError(
            f"{folder}: no train{'|'.join(suffixes)} in this folder, and no dataset_dict.json of "
            "datasets.save_to_disk. Give a file, or a folder that holds train.* and eval.*."
        )
    return tables


def _file(path: Path, cache_dir: Optional[str]) -> _Table:
    if path.suffix != ".parquet":
        records = read_records(path)
        return _Table(
            records.rows, str(path), records.lines, tuple(records.faults), records.lost_behind
        )
    try:
        if not pyarrow.parquet.read_metadata(path).num_rows:  # of which the library makes no table
            return _Table([], str(path))
        # The library takes the path for a pattern, and the size of the first group, which may be 0, for its step.
        pattern = glob.escape(str(path))
        return _Table(
            datasets.Dataset.from_parquet(pattern, cache_dir=cache_dir, batch_size=1000), str(path)
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{path}: not readable as Parquet: {_words(error.__cause__ or error)}"
        ) from error


def _hub(name: str, known: HubSet, cache_dir: Optional[str]) -> dict[str, _Table]:
    repository = known.repository or name
    logger.info("%s: opening from the hub", name)
    try:
        try:
            stored = datasets.load_dataset(repository, known.config, cache_dir=cache_dir)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub converts sets that came with a loading script; the converted files lie on a branch of their own.
            stored = datasets.load_dataset(
                repository,
                data_dir=known.config,
                revision="refs/convert/parquet",
                cache_dir=cache_dir,
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"--data_path {name}: no such file or folder here, and the hub did not give it ({_words(error)}). Give a "
            f"{', '.join(SUFFIXES)} file, a folder that holds train.* and eval.*, or a copy that datasets.save_to_disk "
            f"wrote where the hub can be reached, into a folder that ends with {name}."
        ) from error
    return _named_parts(stored, name)


def _named_parts(stored: datasets.Dataset | datasets.DatasetDict, title: str) -> dict[str, _Table]:
    stored = stored.with_format(
        None
    )  # save_to_disk keeps a format, in which rows are no dictionaries of plain values
    if isinstance(stored, datasets.Dataset):
        return {"train": _Table(stored, title)}
    found = {"train": "train" if "train" in stored or len(stored) != 1 else next(iter(stored))}
    if found["train"] not in stored:
        parts = ", ".join(stored)
        raise ValueError(
            f"{title}: its parts are {parts}, and none is called train. Save the wanted one alone."
        )
    held_out = next(
        (name for name in EVAL_NAMES if name in stored and name != found["train"]), None
    )
    found.update({"eval": held_out} if held_out else {})
    return {part: _Table(stored[name], f"{title} ({name})") for part, name in found.items()}


def _checked(table: _Table, row_of: RowFunction, *, skip: bool) -> Part:
    """All good rows of a table; see `load_source` for what happens to the others."""
    faults = list(table.faults)
    good, has = [], {"prompt": [], "chosen": [], "rejected": []}
    for number, raw in enumerate(_each(table.rows)):
        try:
            row = row_of(raw)
        except ROW_FAULTS as error:
            faults.append(
                (table.lines[number] if table.lines is not None else number + 1, _words(error))
            )
            continue
        good.append(number)
        for name in has:
            has[name].append(bool(getattr(row, name)))
    if faults and (not skip or not good or table.lost_behind is not None):
        raise ValueError(_report(table, sorted(faults), all_bad=not good))
    if faults:
        num_all = len(faults) + len(good)
        logger.warning(
            "left out %d bad rows of %d; the first: %s",
            len(faults),
            num_all,
            _at(table, *min(faults)),
        )
    if not good:
        raise ValueError(
            f"{table.title}: no rows in it. Give at least one, or take it out of --data_path."
        )
    flags = {name: np.array(values, dtype=bool) for name, values in has.items()}
    return Part(
        table.rows, np.array(good, dtype=np.int64), flags, title=table.title, lines=table.lines
    )


def _each(rows: Sequence) -> Iterator[dict]:
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    # In batches, since one row at a time of an Arrow table is twenty times as slow.
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def _report(table: _Table, faults: list[tuple[int, str]], *, all_bad: bool) -> str:
    shown = [_at(table, number, message) for number, message in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        shown.append(f"... and {len(faults) - FAULTS_SHOWN} more.")
    if table.lost_behind is not None:
        remedy = f"How many rows follow line {table.lost_behind} cannot be told, so --skip_bad_rows cannot leave it out. Mend it."
    else:
        remedy = (
            "No row here is usable."
            if all_bad
            else "Mend the rows, or leave them out with --skip_bad_rows."
        )
    shown.append(
        'A row needs "prompt" (text or messages) with "chosen" or "response", or "messages"; pairs need "rejected" too. '
        + remedy
    )
    return "\n".join(shown)


def _at(table: _Table, number: int, message: str) -> str:
    return f"{table.title}, {'row' if table.lines is None else 'line'} {number}: {message}."


def _hold_out(part: Part, *, eval_fraction: float, data_seed: int) -> tuple[Part, Part]:
    if len(part) < 2:
        raise ValueError(
            f"{part.title}: one row cannot be parted into training and evaluation. Give more rows, or an eval.* file."
        )
    if not 0 < eval_fraction < 1:
        raise ValueError(
            f"--eval_fraction {eval_fraction}: give a share between 0 and 1, such as 0.1."
        )
    num_eval = min(len(part) - 1, max(1, round(len(part) * eval_fraction)))
    # RandomState's streams are frozen for good; those of numpy's and torch's newer generators may change.
    order = np.random.RandomState([data_seed & 0xFFFFFFFF, HOLD_OUT_SALT]).permutation(len(part))
    return part.take(np.sort(order[num_eval:])), part.take(np.sort(order[:num_eval]))


def _words(error: BaseException) -> str:
    """An error as one line without its closing full stop."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(".")[:500]
