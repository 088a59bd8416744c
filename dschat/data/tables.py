"""One entry of --data_path opened as tables: local files, folders, and datasets of the hub."""

import bisect
import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet

from dschat.data.readers import read_records
from dschat.runtime.paths import user_path

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
EVAL_NAMES = ("eval", "test", "validation", "valid", "dev")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# DeepSpeed-Chat's name for data/train.json and data/eval.json in the working directory.
LOCAL_JSON = "local/jsonfile"


@dataclass(frozen=True, order=True)
class Fault:
    """A row that cannot be used."""

    position: tuple[int, int]  # number of the file in its table, and line; the order of faults
    place: str
    message: str

    def __str__(self) -> str:
        """Return "rows.jsonl, line 7: message."."""
        return f"{self.place}: {self.message}."


@dataclass(frozen=True)
class Chunk:
    """The rows of a table that come from one file."""

    title: str
    num_rows: int
    # The line of each row; None: messages give the row's number, counted from 1.
    lines: Sequence[int] | None = None
    faults: tuple[tuple[int, str], ...] = ()  # (line, message) of what could not be read
    lost_after: int | None = None  # the line after which rows cannot be told from one another

    def line(self, number: int) -> int:
        """Return the line of row `number` of this file, or its number counted from 1."""
        return number + 1 if self.lines is None else self.lines[number]

    def place(self, line: int) -> str:
        """Return "rows.jsonl, line 7" or "name (train), row 7"."""
        unit = "row" if self.lines is None else "line"
        return f"{self.title}, {unit} {line}"


@dataclass(frozen=True)
class Table:
    """Raw rows, and the file and line of each."""

    rows: Sequence  # list of dict, or a memory-mapped datasets.Dataset
    title: str
    chunks: tuple[Chunk, ...]  # one per file, in the order of the rows

    @property
    def faults(self) -> list[Fault]:
        """What could not be read."""
        return [
            Fault((number, line), chunk.place(line), message)
            for number, chunk in enumerate(self.chunks)
            for line, message in chunk.faults
        ]

    @property
    def lost_after(self) -> str | None:
        """The first line after which rows cannot be told from one another, or None."""
        for chunk in self.chunks:
            if chunk.lost_after is not None:
                alone = len(self.chunks) == 1
                return f"line {chunk.lost_after}" if alone else chunk.place(chunk.lost_after)
        return None

    def place(self, number: int) -> str:
        """Return the place of row `number`: "rows.jsonl, line 7" or "name (train), row 7"."""
        chunk, line = self._locate(number)
        return self.chunks[chunk].place(line)

    def fault(self, number: int, message: str) -> Fault:
        """Return a fault of row `number`."""
        chunk, line = self._locate(number)
        return Fault((chunk, line), self.chunks[chunk].place(line), message)

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the chunk of row `number`, and its line there."""
        ends = []
        for chunk in self.chunks:
            ends.append((ends[-1] if ends else 0) + chunk.num_rows)
        found = bisect.bisect(ends, number)
        start = ends[found - 1] if found else 0
        return found, self.chunks[found].line(number - start)


@dataclass(frozen=True)
class Entry:
    """An entry of --data_path: a path or hub name, and what its suffix ":config@split" says."""

    path: str
    config: str | None = None
    split: str | None = None


def parse_entry(text: str) -> Entry:
    """Separate a path or hub name from its suffix."""
    return Entry(text)


def open_tables(
    path: str,
    *,
    repository: str | None = None,
    config: str | None = None,
    split: str | None = None,
    prefer: tuple[str, ...] = (),
    cache_dir: str | None = None,
) -> dict[str, Table]:
    """Open one entry of --data_path, without its suffix.

    A local path takes precedence over a hub name.

    Args:
        path: a file, a folder, or a hub name.
        repository: the name on the hub, if it differs from `path`.
        config: configuration of a hub dataset.
        split: the part to train on; None: train.
        prefer: endings of the training part for a dataset with several: "sft" for train_sft.
        cache_dir: folder for downloads from the hub; None: that of the datasets library.

    Returns:
        The table "train", and the table "eval" if the entry has an evaluation part.

    Raises:
        ValueError: for anything that cannot be opened; names the path and the remedy.
    """
    if path == LOCAL_JSON:
        return _open_folder(Path("data"), cache_dir, suffixes=(".json",))
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
    return _open_hub_set(path, repository or path, config, cache_dir)


def _exists(local: Path, path: str) -> bool:
    try:
        return local.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise ValueError(
            f"--data_path {path}: {error.strerror}. Give a path that exists, or a name such as "
            "owner/name."
        ) from error


def _open_local(path: Path, cache_dir: str | None) -> dict[str, Table]:
    if path.is_file():
        return {"train": _open_file(path, cache_dir)}
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _open_folder(path, cache_dir)
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(
            f"{path}: not readable as a folder of datasets.save_to_disk: {format_error(error)}"
        ) from error
    return _select_parts(stored, str(path))


def _open_folder(
    folder: Path, cache_dir: str | None, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, Table]:
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


def _open_file(path: Path, cache_dir: str | None) -> Table:
    if path.suffix != ".parquet":
        records = read_records(path)
        chunk = Chunk(
            str(path),
            len(records.rows),
            lines=records.lines,
            faults=tuple(records.faults),
            lost_after=records.lost_after,
        )
        return Table(records.rows, str(path), (chunk,))
    try:
        # The library makes no table of a file without rows.
        if not pyarrow.parquet.read_metadata(path).num_rows:
            return _make_table([], str(path))
        # The library reads the path as a pattern, and takes the size of the first row group as its
        # batch size, which may be 0.
        pattern = glob.escape(str(path))
        table = datasets.Dataset.from_parquet(pattern, cache_dir=cache_dir, batch_size=1000)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = format_error(error.__cause__ or error)
        raise ValueError(f"{path}: not readable as Parquet: {reason}") from error
    return _make_table(table, str(path))


def _open_hub_set(
    name: str, repository: str, config: str | None, cache_dir: str | None
) -> dict[str, Table]:
    logger.info("%s: opening from the hub", name)
    try:
        stored = _load_from_hub(repository, config, cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"--data_path {name}: no such file or folder here, and loading it from the hub failed "
            f"({format_error(error)}). Give a {', '.join(SUFFIXES)} file, or a folder that holds "
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


def _select_parts(stored: datasets.Dataset | datasets.DatasetDict, title: str) -> dict[str, Table]:
    # save_to_disk keeps a format, with which rows may not be dictionaries of plain values.
    stored = stored.with_format(None)
    if isinstance(stored, datasets.Dataset):
        return {"train": _make_table(stored, title)}
    train = "train"
    if train not in stored and len(stored) == 1:
        train = next(iter(stored))
    if train not in stored:
        raise ValueError(
            f"{title}: its parts are {', '.join(stored)}, and none is called train. Save the part "
            "to train on alone."
        )
    tables = {"train": _make_table(stored[train], f"{title} ({train})")}
    for name in EVAL_NAMES:
        if name in stored and name != train:
            tables["eval"] = _make_table(stored[name], f"{title} ({name})")
            break
    return tables


def _make_table(rows: Sequence, title: str) -> Table:
    return Table(rows, title, (Chunk(title, len(rows)),))


def format_error(error: BaseException) -> str:
    """Format an error as one line without its final full stop."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(".")[:500]
