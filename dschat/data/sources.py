"""Datasets by path or name: local files, folders, folders of datasets.save_to_disk, and the hub.

Every row is checked once, when the dataset is opened. A bad row thus stops a run before any model
loads, and the rows left out do not depend on the step: all steps split the same rows.
"""

import functools
import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np

from dschat.data.cache import code_digest, digest_of, keep_arrays, one_at_a_time, prepared_folder
from dschat.data.forms import ROW_FAULTS, Reading, find_form
from dschat.data.hub_sets import HUB_SETS, HubSet, local_json_row
from dschat.data.messages import plain_text
from dschat.data.parallel import map_rows
from dschat.data.row import Row
from dschat.data.tables import LOCAL_JSON, Entry, Fault, Table, open_tables, parse_entry
from dschat.data.templates import parse_turns
from dschat.data.text_checks import describe_fault

logger = logging.getLogger(__name__)

FAULTS_SHOWN = 5
FORM_SAMPLE = 200  # rows whose forms are counted for the log
CACHED_ROWS = 5000  # of fewer rows, checking them again is faster than a cache is worth


@dataclass(frozen=True)
class Part:
    """Rows of one table, in the order in which their raw rows (dictionaries) stand in it."""

    table: Table
    index: np.ndarray  # [N] int64, which raw row
    pick: np.ndarray  # [N] int32, which of the rows that the raw row holds
    # [N] uint64, hash of the conversation's beginning: rows with one hash are never separated
    group: np.ndarray
    # "prompt", "chosen" and "rejected": [N] bool, True if the row has that text
    has: dict[str, np.ndarray]
    columns: dict[str, int] = field(default_factory=dict)  # rows that have each further column
    warning: str = ""  # what was said of bad rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def raw(self, position: int) -> dict:
        """Return the raw row at `position`."""
        return self.table.rows[int(self.index[position])]

    def place(self, position: int) -> str:
        """Return a row's place for messages: "rows.jsonl, line 7" or "name (train), row 7"."""
        return self.table.place(int(self.index[position]))

    def take(self, positions: Sequence[int] | np.ndarray) -> "Part":
        """Return the rows at `positions` as a new part of the same table."""
        positions = np.asarray(positions, dtype=np.int64)
        has = {name: flags[positions] for name, flags in self.has.items()}
        return replace(
            self,
            index=self.index[positions],
            pick=self.pick[positions],
            group=self.group[positions],
            has=has,
        )


@dataclass(frozen=True)
class Source:
    """A dataset: its training rows, its evaluation rows if it has some, and how rows are read."""

    name: str
    train: Part
    eval: Part | None
    reading: Reading
    hub_set: HubSet
    skip_bad_rows: bool

    def row(self, part: Part, position: int) -> Row:
        """Read the row at `position` of `part`; raise ValueError with its place if it is bad."""
        place = part.place(position)
        try:
            rows = self.hub_set.read(part.raw(position), self.reading)
            return replace(rows[part.pick[position]], place=place)
        except ROW_FAULTS as error:
            raise ValueError(f"{place}: {describe_fault(error)}") from error


def load_source(
    path: str,
    *,
    reading: Reading | None = None,
    skip_bad_rows: bool = False,
    config: str | None = None,
    split: str | None = None,
    prefer: tuple[str, ...] = (),
    cache_dir: str | None = None,
    given: dict[str, Table] | None = None,
) -> Source:
    """Open one entry of --data_path.

    A local path takes precedence over a hub name. A dataset of ``hub_sets.HUB_SETS`` is recognized
    by its exact name, and a local copy of it by a path that ends with that name.

    Args:
        path: see `tables.open_tables`; local/jsonfile stands for data/train.json and data/eval.json
            in the working directory.
        reading: the columns, and the pairs of ranked answers.
        skip_bad_rows: leave malformed rows out and log their number, instead of raising.
        config: configuration of a hub dataset whose entry names none.
        split: part to train on, if the entry names none.
        prefer: see `tables.open_tables`.
        cache_dir: folder for downloads from the hub; None: that of the datasets library.
        given: the tables that `path` stands for, from ``memory.tables_in_memory``; None: open it.

    Raises:
        ValueError: for anything that cannot be used; names the file and line or the dataset and
            row, and the remedy.
    """
    entry = parse_entry(path) if given is None else Entry(path)
    known_set = find_hub_set(entry.path) if given is None else None
    hub_set = known_set or HubSet()
    if path == LOCAL_JSON:
        hub_set = HubSet(local_json_row)
    reading = reading or Reading()
    tables = given or open_tables(
        entry.path,
        repository=hub_set.repository,
        config=entry.config or hub_set.config or config,
        split=entry.split or split,
        prefer=prefer,
        cache_dir=cache_dir,
    )
    # Users cannot fix a published set, and the known ones have a few rows without a usable answer.
    skip = skip_bad_rows or known_set is not None
    parts = {
        name: _check_or_load(table, hub_set, reading, skip=skip, cache_dir=cache_dir)
        for name, table in tables.items()
    }
    return Source(
        name=path,
        train=parts["train"],
        eval=parts.get("eval"),
        reading=reading,
        hub_set=hub_set,
        skip_bad_rows=skip,
    )


def describe_columns(part: Part) -> str:
    """Describe the columns that no form uses, or return an empty string if there are none."""
    counts = [f"{name} ({count} rows)" for name, count in sorted(part.columns.items())]
    return ", ".join(counts)


def describe_forms(source: Source) -> str:
    """Describe the forms of the first rows of a source."""
    if source.hub_set.row_function is not None:
        return "a known dataset"
    first = range(min(FORM_SAMPLE, len(source.train)))
    forms = Counter(find_form(source.train.raw(i), source.reading).name for i in first)
    return ", ".join(name for name, _ in forms.most_common())


def conversation_group(row: Row) -> int:
    """Return a hash of a conversation's beginning, the user's first message, in 64 bits.

    Rows that begin alike are never separated: neither into training and evaluation rows, nor into
    different steps. Only if all rows of a table begin alike, their answers count too.
    """
    if isinstance(row.prompt, str):
        turns = parse_turns(row.prompt)
        text = turns[0]["content"] if turns else row.prompt
    else:
        text = next((m["content"] for m in row.prompt if m["role"] == "user"), "")
    if not text.strip() and row.chosen is not None:
        text = plain_text(row.chosen)
    return _hash_text(text)


def _hash_text(text: str) -> int:
    """Return a hash of a text in 64 bits, whatever white space is between its words."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def find_hub_set(path: str) -> HubSet | None:
    """Return the known dataset with the name `path`, or whose name is the end of `path`."""
    parts = Path(path).parts
    names = (path, "/".join(parts[-2:]), "".join(parts[-1:]))
    return next((HUB_SETS[name] for name in names if name in HUB_SETS), None)


def _check_or_load(
    table: Table, hub_set: HubSet, reading: Reading, *, skip: bool, cache_dir: str | None
) -> Part:
    """Check a table, or take what an earlier check of the same rows found from the cache."""
    if len(table.rows) < CACHED_ROWS:
        return _check_table(table, hub_set, reading, skip=skip)
    how = f"{hub_set.name_of_function} {reading} {skip}"
    folder = prepared_folder(cache_dir)
    name = digest_of(table.digest(folder), how.encode(), code_digest())
    file = folder / f"{name}.npz"
    with one_at_a_time(file):  # the ranks of a host come here together
        if file.is_file():
            return _load_part(table, file)
        part = _check_table(table, hub_set, reading, skip=skip)
        _save_part(part, file)
    return part


def _save_part(part: Part, file: Path) -> None:
    arrays = {f"has_{name}": flags for name, flags in part.has.items()}
    arrays |= {"index": part.index, "pick": part.pick, "group": part.group}
    arrays |= {"columns": np.array(json.dumps(part.columns)), "warning": np.array(part.warning)}
    keep_arrays(file, arrays)


def _load_part(table: Table, file: Path) -> Part:
    with np.load(file, allow_pickle=False) as arrays:
        warning = str(arrays["warning"])
        if warning:
            logger.warning("%s", warning)
        return Part(
            table=table,
            index=arrays["index"],
            pick=arrays["pick"],
            group=arrays["group"],
            has={name: arrays[f"has_{name}"] for name in ("prompt", "chosen", "rejected")},
            columns=json.loads(str(arrays["columns"])),
            warning=warning,
        )


@dataclass
class _Checked:
    """The rows of a table, or of a part of it, that were found; as `Part` has them."""

    # Arrays, since a list of a million int takes 40 MB.
    index: array = field(default_factory=lambda: array("q"))
    pick: array = field(default_factory=lambda: array("i"))
    group: array = field(default_factory=lambda: array("Q"))
    has: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray() for name in ("prompt", "chosen", "rejected")}
    )
    columns: Counter = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: "_Checked") -> None:
        """Add the rows of the next part."""
        self.index.extend(other.index)
        self.pick.extend(other.pick)
        self.group.extend(other.group)
        for name, flags in self.has.items():
            flags.extend(other.has[name])
        self.columns.update(other.columns)
        self.faults.extend(other.faults)


def _check_rows(table: Table, hub_set: HubSet, reading: Reading, numbers: range) -> _Checked:
    """Read some raw rows of a table."""
    found = _Checked()
    for number, raw in zip(numbers, _iterate_rows(table.rows, numbers), strict=True):
        try:
            rows = hub_set.read(raw, reading)
            groups = [conversation_group(row) for row in rows]
        except ROW_FAULTS as error:
            found.faults.append(table.fault(number, describe_fault(error)))
            continue
        for choice, row in enumerate(rows):
            found.index.append(number)
            found.pick.append(choice)
            found.group.append(groups[choice])
            found.has["prompt"].append(bool(row.prompt))
            found.has["chosen"].append(row.chosen is not None)
            found.has["rejected"].append(row.rejected is not None)
        if rows:
            further = rows[0].columns
            found.columns.update(name for name in further if raw.get(name) is not None)
    return found


def _check_table(table: Table, hub_set: HubSet, reading: Reading, *, skip: bool) -> Part:
    """Return all good rows of a table; raise ValueError for others, or leave them out if `skip`."""
    found = _Checked(faults=table.faults)
    check_rows = functools.partial(_check_rows, table, hub_set, reading)
    for part in map_rows(check_rows, len(table.rows), name=f"{table.title}: checked"):
        found.add(part)
    index, pick, group = found.index, found.pick, found.group
    if group and all(value == group[0] for value in group):
        # One prompt for all rows: their answers tell them apart.
        all_rows = (hub_set.read(table.rows[number], reading) for number in index)
        alike = [rows[choice] for rows, choice in zip(all_rows, pick, strict=True)]
        group = array("Q", (_hash_text(f"{row.prompt} {row.chosen}") for row in alike))
    if found.faults and (not skip or not index or table.lost_after is not None):
        raise ValueError(_format_faults(table, sorted(found.faults), all_bad=not index))
    warning = ""
    if found.faults:
        total = len(found.faults) + len(index)
        warning = (
            f"left out {len(found.faults)} bad rows of {total}; the first: {min(found.faults)}"
        )
        logger.warning("%s", warning)
    if not index:
        raise ValueError(
            f"{table.title}: no rows in it. Give at least one, or take it out of --data_path."
        )
    return Part(
        table=table,
        index=np.array(index, dtype=np.int64),
        pick=np.array(pick, dtype=np.int32),
        group=np.array(group, dtype=np.uint64),
        has={name: np.array(flags, dtype=bool) for name, flags in found.has.items()},
        columns=dict(found.columns),
        warning=warning,
    )


def _iterate_rows(rows: Sequence, numbers: range) -> Iterator[dict]:
    if not isinstance(rows, datasets.Dataset):
        yield from map(rows.__getitem__, numbers)
        return
    # At once: reading an Arrow table one row at a time is twenty times as slow.
    batch = rows[numbers.start : numbers.stop]
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
    shown.append(f"{remedy} The forms that rows may have are in docs/data.md.")
    return "\n".join(shown)
