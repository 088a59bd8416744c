"""One entry of --data_path opened as tables: local files, folders, and datasets of the hub."""

import bisect
import functools
import glob
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from dschat.data.cache import file_digest, prepared_folder
from dschat.data.readers import (
    COMPRESSED_SUFFIXES,
    RECORD_SUFFIXES,
    file_suffix,
    read_records,
)
from dschat.data.text_checks import describe_fault
from dschat.runtime.paths import user_path

logger = logging.getLogger(__name__)

SUFFIXES = (*RECORD_SUFFIXES, *COMPRESSED_SUFFIXES, ".parquet", ".arrow")
EVAL_NAMES = ("eval", "test", "validation", "valid", "dev")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLIT_NAME = re.compile(r"\w[\w.-]*")
# An entry with the suffix :config, @split or :config@split. The split may be a slice of the hub's
# syntax, such as train[:10%].
ENTRY = re.compile(r"(?P<path>.+?)(:(?P<config>[\w.+-]+))?(@(?P<split>\w[\w.+:%()\[\]-]*))?")
# The number that ends the name of one file of several: train_0001, train_00000_of_00002.
SHARD_NUMBER = re.compile(r"_?\d+(_of_\d+)?$")
SHARD_OF = re.compile(r"[-_](\d+)[-_]of[-_](\d+)")
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
    unit: str = "line"  # of `lines`, for messages
    faults: tuple[tuple[int, str], ...] = ()  # (line, message) of what could not be read
    lost_after: int | None = None  # the line after which rows cannot be told from one another

    def line(self, number: int) -> int:
        """Return the line of row `number` of this file, or its number counted from 1."""
        return number + 1 if self.lines is None else self.lines[number]

    def place(self, line: int) -> str:
        """Return "rows.jsonl, line 7" or "name (train), row 7"."""
        unit = "row" if self.lines is None else self.unit
        return f"{self.title}, {unit} {line}"


@dataclass(frozen=True)
class Table:
    """Raw rows, and the file and line of each."""

    rows: Sequence  # list of dict, or a memory-mapped datasets.Dataset
    title: str
    chunks: tuple[Chunk, ...]  # one per file, in the order of the rows
    content: bytes = b""  # a hash of rows that are in no file

    @property
    def faults(self) -> list[Fault]:
        """The rows that could not be read."""
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

    def digest(self, folder: Path) -> bytes:
        """Return a hash of the content; those of files are kept in `folder`."""
        if self.content:
            return self.content
        if isinstance(self.rows, datasets.Dataset):
            return self.rows._fingerprint.encode()
        return b"".join(file_digest(chunk.title, folder) for chunk in self.chunks)

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the chunk of row `number`, and its line there."""
        chunk = bisect.bisect(self._ends, number)
        start = self._ends[chunk - 1] if chunk else 0
        return chunk, self.chunks[chunk].line(number - start)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(chunk.num_rows for chunk in self.chunks))


class ChainedRows(Sequence):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        """Return the number of rows of all files."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> dict:  # type: ignore[override]
        """Read a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


@dataclass(frozen=True)
class Entry:
    """An entry of --data_path: a path or hub name, and what its suffix ":config@split" says."""

    path: str
    config: str | None = None
    split: str | None = None


def parse_entry(text: str) -> Entry:
    """Separate a path or hub name from its suffix ":config", "@split" or ":config@split".

    A path that exists has no suffix, whatever its name.

    Raises:
        ValueError: the suffix names a part or configuration of a path that has none.
    """
    match = ENTRY.fullmatch(text)
    if not match or not (match["config"] or match["split"]) or _exists(user_path(text), text):
        return Entry(text)
    entry = Entry(**match.groupdict())
    local = user_path(entry.path)
    if not _exists(local, entry.path):
        is_hub_name = HUB_NAME.fullmatch(entry.path) and not entry.path.startswith(".")
        return entry if is_hub_name and not text.endswith(SUFFIXES) else Entry(text)
    if entry.config and not (local / entry.config).is_dir():
        raise ValueError(
            f"--data_path {text}: {entry.path} has no folder {entry.config}. Leave "
            f":{entry.config} out."
        )
    is_one_table = (local / "state.json").exists() and not (local / "dataset_dict.json").exists()
    if entry.split and (local.is_file() or is_one_table):
        raise ValueError(
            f"--data_path {text}: {entry.path} is one table without parts. Leave "
            f"@{entry.split} out."
        )
    return entry


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

    If several parts exist and none is called train, the training part is the first train_ENDING
    of `prefer`; it is evaluated on test_ENDING. A pattern and a folder of numbered files are one
    table, in the order of the names.

    Args:
        path: a file, a folder, a pattern over files, or a hub name.
        repository: the name on the hub, if it differs from `path`.
        config: configuration of a hub dataset; of a local copy, its folder, if there is one.
        split: the part to train on; a hub name may have a slice: train[:10%]. None: train. Files
            and patterns have no parts and ignore it.
        prefer: endings of the training part, the best first: "sft" for train_sft.
        cache_dir: folder for downloads from the hub; None: that of the datasets library.

    Returns:
        The table "train", and the table "eval" if the entry has an evaluation part.

    Raises:
        ValueError: for anything that cannot be opened; names the path and the remedy.
    """
    choice = _Choice(split, prefer)
    if path == LOCAL_JSON:
        return _open_folder(Path("data"), choice, cache_dir, suffixes=(".json",))
    local = user_path(path)
    if _exists(local, path):
        if local.is_file():
            return {"train": _open_file(local, cache_dir)}
        if not local.is_dir():
            raise ValueError(
                f"--data_path {path}: neither a file nor a folder. Give a file or a folder."
            )
        if config and (local / config).is_dir():
            local = local / config
        if any((local / name).exists() for name in ("dataset_dict.json", "state.json")):
            return _select_parts(_load_from_disk(local), str(local), choice)
        return _open_folder(local, choice, cache_dir)
    if set(path) & set("*?["):
        return {"train": _open_pattern(path, cache_dir)}
    looks_local = path.startswith((".", "/", "~")) or path.endswith(SUFFIXES)
    if looks_local or not HUB_NAME.fullmatch(path):
        raise ValueError(
            f"--data_path {path}: no such file or folder, and not a possible hub name. Give a path "
            "that exists, or a name such as owner/name."
        )
    return _open_hub_set(path, repository or path, config, choice, cache_dir)


def find_train_files(path: str, split: str | None, prefer: tuple[str, ...]) -> list[Path] | None:
    """Return the files of an entry's training part, in order; None if the entry is a hub name.

    Args:
        path: see `open_tables`, as for `split` and `prefer`.
        split: the part to train on.
        prefer: endings of the training part, the best first.

    Raises:
        ValueError: there are none.
    """
    local = user_path(path)
    if set(path) & set("*?[") and not _exists(local, path):
        return _match_pattern(path)
    if not _exists(local, path):
        return None
    if local.is_file():
        return [local]
    for folder in (local, local / "data"):
        parts = _list_parts(folder, SUFFIXES)
        train = _Choice(split, prefer).find(list(parts))
        if train is not None:
            files = parts[train]
            if files[0].is_dir():
                files = [file for file in _list_folder(files[0]) if _is_data_file(file, SUFFIXES)]
            _check_shards(folder, train, files)
            return files
    raise ValueError(
        f"--data_path {path}: no file of a part to train on. Give a file, a pattern over files, or "
        "a folder that holds train.*."
    )


@dataclass(frozen=True)
class _Choice:
    """A choice of the part to train on among several."""

    split: str | None
    prefer: tuple[str, ...]

    def find(self, names: Sequence[str]) -> str | None:
        """Return the training part among `names`, or None."""
        if self.split:
            return self.split if self.split in names else None
        if "train" in names:
            return "train"
        for ending in self.prefer:
            if f"train_{ending}" in names:
                return f"train_{ending}"
        alone = [name for name in names if name.startswith("train")]
        return alone[0] if len(alone) == 1 else None


def _find_eval(names: Sequence[str], train: str) -> str | None:
    """Return the evaluation part that belongs to the training part, or None."""
    if train.split("_")[0] in EVAL_NAMES:
        return None
    ending = train.removeprefix("train") if train.startswith("train_") else ""
    return next((name + ending for name in EVAL_NAMES if name + ending in names), None)


def _no_part(title: str, names: Sequence[str], split: str | None) -> ValueError:
    """Make the error of an entry without the training part."""
    parts = f"its parts are {', '.join(names)}"
    if split and not SPLIT_NAME.fullmatch(split):
        return ValueError(
            f"{title}: {split} is a slice, which only a name of the hub can have; {parts}. Name "
            f"one of them, such as {title}@{names[0]}."
        )
    if split:
        return ValueError(
            f"{title}: {parts}, and none is called {split}. Name one of them, such as "
            f"{title}@{names[0]}."
        )
    return ValueError(
        f"{title}: {parts}, and none is called train. Add the part to train on to the entry, such "
        f"as {title}@{names[0]}, or give --dataset_split."
    )


def _log_parts(title: str, train: str, evaluation: str | None) -> None:
    logger.info(
        "%s: training on part %s, evaluating on %s",
        title,
        train,
        f"part {evaluation}" if evaluation else "rows held out from it",
    )


def _exists(local: Path, path: str) -> bool:
    try:
        return local.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise ValueError(
            f"--data_path {path}: {error.strerror}. Give a path that exists, or a name such as "
            "owner/name."
        ) from error


def _load_from_disk(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(
            f"{path}: not readable as a folder of datasets.save_to_disk: {describe_fault(error)}"
        ) from error


def _open_folder(
    folder: Path,
    choice: _Choice,
    cache_dir: str | None,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> dict[str, Table]:
    """Open a folder of files or folders that are named by their parts, also if in its data/."""
    parts = _list_parts(folder, suffixes)
    train = choice.find(list(parts))
    if train is None and (folder / "data").is_dir():
        inner = _list_parts(folder / "data", suffixes)
        train = choice.find(list(inner))
        parts = inner or parts
    named = list(parts) if choice.split else [name for name in parts if name.startswith("train")]
    if train is None and named:
        raise _no_part(str(folder), named, choice.split)
    if train is None:
        wanted = "train" + (suffixes[0] if len(suffixes) == 1 else ".*")
        subfolders = [path for path in _list_folder(folder) if path.is_dir()]
        fit = [path.name for path in subfolders if choice.find(list(_list_parts(path, suffixes)))]
        if fit:
            raise ValueError(
                f"{folder}: no {wanted} in this folder, but in its folders {', '.join(fit)}. Give "
                f"one of them, such as {folder / fit[0]}."
            )
        raise ValueError(
            f"{folder}: no {wanted} in this folder or its data folder, no train-*.* of several "
            "files, and no dataset_dict.json of datasets.save_to_disk. Give a file, or a folder "
            "that holds train.* and eval.*."
        )
    evaluation = _find_eval(list(parts), train)
    if train != "train":
        _log_parts(str(folder), train, evaluation)
    tables = {"train": _open_part(folder, train, parts[train], suffixes, cache_dir)}
    if evaluation:
        tables["eval"] = _open_part(folder, evaluation, parts[evaluation], suffixes, cache_dir)
    return tables


def _list_parts(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Return the files of each part of a folder, in order; a part may be a folder of files."""
    parts: dict[str, list[Path]] = {}
    for path in _list_folder(folder):
        if path.is_dir():
            if path.name.split("_")[0] in ("train", *EVAL_NAMES):
                parts.setdefault(path.name, []).append(path)
        elif _is_data_file(path, suffixes):
            parts.setdefault(_part_name(path), []).append(path)
    return parts


def _list_folder(folder: Path) -> list[Path]:
    try:
        # "." and "_": caches and markers of other programs.
        return sorted(path for path in folder.iterdir() if path.name[0] not in "._")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}. Give a folder that may be read.") from error


def _is_data_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    return file_suffix(path) in suffixes and path.is_file()


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name.removesuffix(file_suffix(path))


def _part_name(path: Path) -> str:
    """Return the part that a file name begins with: train for train-00000-of-00002.parquet."""
    stem = _stem(path)
    word = re.match(r"\w*", stem).group()
    return SHARD_NUMBER.sub("", word) or stem


def _open_part(
    folder: Path, part: str, paths: list[Path], suffixes: tuple[str, ...], cache_dir: str | None
) -> Table:
    """Open the files of a part as one table."""
    _check_shards(folder, part, paths)
    if not paths[0].is_dir():
        return _open_files(paths, f"{folder} ({part})", cache_dir)
    inner = paths[0]
    if (inner / "state.json").exists():
        return _make_table(_load_from_disk(inner).with_format(None), str(inner))
    files = [path for path in _list_folder(inner) if _is_data_file(path, suffixes)]
    if not files:
        raise ValueError(
            f"{inner}: no {', '.join(suffixes)} file in it. Add one, or remove the folder."
        )
    _check_shards(inner, part, files)
    return _open_files(files, str(inner), cache_dir)


def _check_shards(folder: Path, part: str, paths: list[Path]) -> None:
    """Raise ValueError if files of a part repeat its rows, or if one of a counted set is missing.

    Repeats are one file in two formats, or train.jsonl beside train-0.jsonl.
    """
    stems = [_stem(path) for path in paths]
    repeated = [path for path, stem in zip(paths, stems, strict=True) if stems.count(stem) > 1]
    if part in stems and len(paths) > 1:
        repeated = paths
    if repeated:
        names = " and ".join(path.name for path in repeated[:3])
        raise ValueError(
            f"{folder}: {names} are both its {part} part; keep one. If the rows differ, give a "
            "pattern over the files."
        )
    numbers = [SHARD_OF.search(stem) for stem in stems]
    if not all(numbers):
        return
    total = max(int(match[2]) for match in numbers)
    missing = sorted(set(range(total)) - {int(match[1]) for match in numbers})
    if missing and len(paths) < total:
        raise ValueError(
            f"{folder}: {len(paths)} of the {total} files of its {part} part are here; the first "
            f"missing has number {missing[0]}. Download or copy the folder again."
        )


def _open_pattern(pattern: str, cache_dir: str | None) -> Table:
    return _open_files(_match_pattern(pattern), pattern, cache_dir)


def _match_pattern(pattern: str) -> list[Path]:
    found = sorted(glob.glob(str(user_path(pattern)), recursive=True))
    files = [Path(path) for path in found if Path(path).is_file()]
    if not files:
        raise ValueError(
            f"--data_path {pattern}: no such file, and as a pattern it matches none. Give a path "
            "that exists, or a pattern such as folder/*.jsonl, in quotes."
        )
    return files


def _open_files(paths: list[Path], title: str, cache_dir: str | None) -> Table:
    """Open files as one table, in their order."""
    tables = [_open_file(path, cache_dir) for path in paths]
    if len(tables) == 1:
        return tables[0]
    chunks = tuple(chunk for table in tables for chunk in table.chunks)
    full = [table for table in tables if len(table.rows)]
    arrow = [table.rows for table in full if isinstance(table.rows, datasets.Dataset)]
    if not arrow:
        return Table(ChainedRows([table.rows for table in full]), title, chunks)
    if len(arrow) < len(full):
        raise ValueError(
            f"{title}: its {len(paths)} files are of different kinds, some Parquet or Arrow and "
            "some not. Give each kind as an entry of --data_path."
        )
    try:
        return Table(datasets.concatenate_datasets(arrow), title, chunks)
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{title}: its {len(paths)} files have different columns ({describe_fault(error)}). "
            "Give each kind as an entry of --data_path."
        ) from error


def _open_file(path: Path, cache_dir: str | None) -> Table:
    suffix = file_suffix(path)
    if suffix == ".parquet":
        return _open_parquet(path, cache_dir)
    if suffix == ".arrow":
        return _open_arrow(path)
    records = read_records(path, cache_folder=prepared_folder(cache_dir))
    chunk = Chunk(
        str(path),
        len(records.rows),
        lines=records.lines,
        faults=tuple(records.faults),
        lost_after=records.lost_after,
    )
    return Table(records.rows, str(path), (chunk,))


def _open_arrow(path: Path) -> Table:
    """Map a file of datasets (a stream of Arrow) or of Arrow's file format."""
    try:
        with path.open("rb") as file:
            is_stream = file.read(6) != b"ARROW1"
        if is_stream:
            rows = datasets.Dataset.from_file(str(path))
        else:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
            rows = datasets.Dataset(datasets.table.InMemoryTable(table))
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(f"{path}: not readable as Arrow: {describe_fault(error)}") from error
    return _make_table(rows if len(rows) else [], str(path))


def _open_parquet(path: Path, cache_dir: str | None) -> Table:
    try:
        # The library makes no table of a file without rows.
        if not pyarrow.parquet.read_metadata(path).num_rows:
            return _make_table([], str(path))
        # The library reads the path as a pattern, and takes the size of the first row group as its
        # batch size, which may be 0.
        pattern = glob.escape(str(path))
        table = datasets.Dataset.from_parquet(pattern, cache_dir=cache_dir, batch_size=1000)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = describe_fault(error.__cause__ or error)
        raise ValueError(f"{path}: not readable as Parquet: {reason}") from error
    return _make_table(table, str(path))


def _open_hub_set(
    name: str, repository: str, config: str | None, choice: _Choice, cache_dir: str | None
) -> dict[str, Table]:
    logger.info("%s: opening from the hub", name)
    options = {"cache_dir": cache_dir}
    sliced = choice.split and not SPLIT_NAME.fullmatch(choice.split)
    if sliced:
        options["split"] = choice.split
    try:
        stored = _load_from_hub(repository, config, options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = describe_fault(error)
        if "onfig name is missing" in message or "BuilderConfig" in message:
            raise ValueError(
                f"--data_path {name}: no such configuration, or none given ({message}). Add one "
                f"to the entry, {name}:CONFIG, or give --dataset_config."
            ) from error
        raise ValueError(
            f"--data_path {name}: no such file or folder here, and loading it from the hub failed "
            f"({message}). Give a file ({', '.join(RECORD_SUFFIXES)}, .parquet, .arrow), or a "
            "folder that holds train.* and eval.*. If another machine reaches the hub, write a "
            f"copy there with datasets.save_to_disk, into a folder whose path ends with {name}, "
            "and give that."
        ) from error
    if sliced:
        return {"train": _make_table(stored.with_format(None), f"{name} ({choice.split})")}
    return _select_parts(stored, name, choice)


def _load_from_hub(
    repository: str, config: str | None, options: dict
) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_dataset(repository, config, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # The hub converts datasets with a loading script; the converted files are on this branch.
        return datasets.load_dataset(
            repository, data_dir=config, revision="refs/convert/parquet", **options
        )


def _select_parts(
    stored: datasets.Dataset | datasets.DatasetDict, title: str, choice: _Choice
) -> dict[str, Table]:
    # save_to_disk keeps a format, with which rows may not be dictionaries of plain values.
    stored = stored.with_format(None)
    if isinstance(stored, datasets.Dataset):
        return {"train": _make_table(stored, title)}
    names = list(stored)
    train = choice.find(names)
    if train is None and len(names) == 1 and not choice.split:
        train = names[0]
    if train is None:
        raise _no_part(title, names, choice.split)
    evaluation = _find_eval(names, train)
    if train != "train":
        _log_parts(title, train, evaluation)
    tables = {"train": _make_table(stored[train], f"{title} ({train})")}
    if evaluation:
        tables["eval"] = _make_table(stored[evaluation], f"{title} ({evaluation})")
    return tables


def _make_table(rows: Sequence, title: str) -> Table:
    return Table(rows, title, (Chunk(title, len(rows)),))
