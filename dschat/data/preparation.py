"""Tokenize every row once, before training, and keep the result in the user's cache.

The result is an Arrow file that all ranks of a host map into memory. Its name is a hash of all that
decides what is in it: the rows, the tokenizer with its template, the options, and this package's
own code. A second start with the same data reads it and does no work.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import code_digest, digest_of
from dschat.data.datasets import LeftOut, TextDataset
from dschat.data.parallel import map_rows
from dschat.data.row import Row
from dschat.data.splits import Blend
from dschat.data.templates import Rendered
from dschat.runtime.files import write_json

logger = logging.getLogger(__name__)

FAULTS_SHOWN = 5


@dataclass
class Report:
    """A count of a dataset's rows: used, shortened, left out."""

    num_rows: int = 0
    # Positions of the rows that are used.
    kept: array = field(default_factory=lambda: array("q"))
    num_cut: int = 0  # of the kept rows, those that are longer than the limit
    longest: int = 0  # tokens of the longest row before truncation
    num_tokens: int = 0  # of all kept items
    num_hidden_turns: int = 0  # see `templates.Rendered`
    left_out: Counter = field(default_factory=Counter)  # rows by reason
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)  # the first of each kind
    items_digest: str = field(default="", compare=False)  # a hash of all kept items

    def add(self, other: "Report") -> None:
        """Add the rows of another part, which follow."""
        self.num_rows += other.num_rows
        self.kept.extend(other.kept)
        self.num_cut += other.num_cut
        self.longest = max(self.longest, other.longest)
        self.num_tokens += other.num_tokens
        self.num_hidden_turns += other.num_hidden_turns
        self.left_out.update(other.left_out)
        self.num_faults += other.num_faults
        self.faults += other.faults[: FAULTS_SHOWN - len(self.faults)]

    def describe(self, limit: str) -> str:
        """Describe the rows in one line.

        Args:
            limit: the limit's flag and value.
        """
        parts = [f"{len(self.kept)} of {self.num_rows} rows"]
        cut = f"{self.num_cut} are longer than {limit} and are cut"
        parts.append(f"{cut} (longest: {self.longest} tokens)")
        for reason, count in self.left_out.most_common():
            share = count / max(1, self.num_rows)
            parts.append(f"{count} ({share:.1%}) left out: {reason}")
        if self.num_hidden_turns:
            parts.append(
                f"{self.num_hidden_turns} earlier answers are not learned, since the chat template "
                "shows them differently later on"
            )
        return "; ".join(parts)


def prepare(
    dataset: TextDataset, *, cache_dir: Path | None, skip_bad_rows: bool, name: str
) -> Report:
    """Encode all rows of `dataset` and let it read them from the result, in place.

    Rows that are left out are removed from the dataset. Its `items_digest` is set, which does not
    depend on where the result is kept.

    Args:
        dataset: its rows are a `Blend` or a list.
        cache_dir: folder for the result, see `cache.prepared_folder`; None: keep it in memory.
        skip_bad_rows: leave out rows that cannot be encoded, instead of raising.
        name: what the rows are, for messages.

    Raises:
        ValueError: rows that cannot be encoded; names the first ones.
    """
    key = _key(dataset, cache_dir) if cache_dir is not None else None
    if key is None:
        report, table = _in_memory(dataset, name)
    else:
        report, table = _in_cache(dataset, cache_dir, key, name)
    if report.num_faults:
        _raise_or_warn(report, skip=skip_bad_rows and bool(report.kept), name=name)
    rows = dataset.rows
    if len(report.kept) < len(rows):
        if isinstance(rows, Blend):
            rows = rows.take(report.kept)
        else:
            rows = [rows[position] for position in report.kept]
    dataset.rows = rows
    dataset.prepared = table
    dataset.items_digest = report.items_digest
    return report


def _raise_or_warn(report: Report, *, skip: bool, name: str) -> None:
    shown = report.faults[:FAULTS_SHOWN]
    if report.num_faults > len(shown):
        shown = [*shown, f"... and {report.num_faults - len(shown)} more."]
    if not skip:
        remedy = "Fix the rows, or leave them out with --skip_bad_rows."
        if not report.kept:
            remedy = "No row here is usable."
        raise ValueError("\n".join([*shown, remedy]))
    logger.warning(
        "%s: left out %d of %d rows that cannot be shown: %s",
        name,
        report.num_faults,
        report.num_rows,
        " ".join(shown),
    )


def _in_memory(dataset: TextDataset, name: str) -> tuple[Report, list[dict]]:
    report = Report()
    batches = _prepare_items(dataset, report, name)
    return report, [item for batch in batches for item in batch.to_pylist()]


def _in_cache(
    dataset: TextDataset, folder: Path, key: str, name: str
) -> tuple[Report, datasets.Dataset | list[dict]]:
    table_file = folder / f"{key}.arrow"
    report_file = folder / f"{key}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The ranks of a host come here at the same time: the first one encodes.
        with filelock.FileLock(folder / f"{key}.lock"):
            if not report_file.is_file():
                report = Report()
                _write(dataset, report, table_file, name)
                write_json(report_file, _to_json(report))
    except OSError as error:
        logger.warning(
            "%s: the cache cannot be written (%s), so the rows are kept in memory", folder, error
        )
        return _in_memory(dataset, name)
    report = _from_json(json.loads(report_file.read_text()))
    if not report.kept:
        return report, []
    return report, datasets.Dataset.from_file(str(table_file))


def _write(dataset: TextDataset, report: Report, path: Path, name: str) -> None:
    """Write the items as an Arrow stream, under their name only once they are complete."""
    temporary = path.with_suffix(f".{os.getpid()}")
    schema = _schema(dataset)
    with open(temporary, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _prepare_items(dataset, report, name):
            writer.write_batch(batch)
    os.replace(temporary, path)


def _schema(dataset: TextDataset) -> pyarrow.Schema:
    columns = {name: pyarrow.list_(pyarrow.int32()) for name in dataset.list_columns}
    columns |= {name: pyarrow.float64() for name in dataset.number_columns}
    return pyarrow.schema(list(columns.items()))


@dataclass
class EncodedRow:
    """A row that could be shown, and what became of it."""

    position: int
    row: Row
    rendered: Rendered
    num_tokens: int  # before truncation
    item: dict | None  # the prepared item; None if the row is left out


def encode_rows(
    dataset: TextDataset, report: Report, *, name: str, most_faults: int | None = FAULTS_SHOWN
) -> Iterator[list[EncodedRow]]:
    """Encode all rows, a chunk at a time, and count in `report` what becomes of them.

    Args:
        dataset: not changed.
        report: an empty one.
        name: what the rows are, for progress in the log.
        most_faults: keep this many messages of faults; None: all.
    """
    encode = functools.partial(_encode_chunk, dataset, report, most_faults)
    yield from map_rows(encode, len(dataset), name=f"{name}: tokenized", serial=True)


def _encode_chunk(
    dataset: TextDataset, report: Report, most_faults: int | None, positions: range
) -> list[EncodedRow]:
    def add_fault(error: ValueError) -> None:
        report.num_faults += 1
        if most_faults is None or len(report.faults) < most_faults:
            report.faults.append(str(error))

    report.num_rows += len(positions)
    rows = []
    for position in positions:
        try:
            row = dataset.row(position)
            rows.append((position, row, dataset.render(row)))
        except ValueError as error:
            add_fault(error)
    encoded_rows = dataset.encoder.encode_all([rendered for _, _, rendered in rows])
    found = []
    for (position, row, rendered), encoded in zip(rows, encoded_rows, strict=True):
        num_tokens = dataset.num_tokens(encoded)
        report.longest = max(report.longest, num_tokens)
        item = None
        try:
            item = dataset.fit(row, encoded)
        except LeftOut as reason:
            report.left_out[reason.kind] += 1
        except ValueError as error:
            add_fault(error)
        if item is not None:
            report.kept.append(position)
            report.num_cut += num_tokens > dataset.limit
            report.num_tokens += min(num_tokens, dataset.limit)
            report.num_hidden_turns += encoded.num_hidden_turns
        found.append(EncodedRow(position, row, rendered, num_tokens, item))
    return found


# Columns of items: lists of int as all values [sum of T] int32 and the length [N] of each; numbers
# as float64 [N].
Columns = dict[str, tuple[np.ndarray, np.ndarray] | np.ndarray]


def _prepare_chunk(dataset: TextDataset, positions: range) -> tuple[Report, Columns]:
    """Return what becomes of a chunk of rows, and the items of those that are used."""
    report = Report()
    rows = _encode_chunk(dataset, report, FAULTS_SHOWN, positions)
    items = [row.item for row in rows if row.item is not None]
    columns: Columns = {}
    for name in dataset.list_columns:
        lists = [item[name] for item in items]
        lengths = np.fromiter(map(len, lists), np.int32, len(lists))
        values = np.fromiter(itertools.chain.from_iterable(lists), np.int32, lengths.sum())
        columns[name] = values, lengths
    for name in dataset.number_columns:
        columns[name] = np.array([item[name] for item in items], dtype=np.float64)
    return report, columns


def _prepare_items(
    dataset: TextDataset, report: Report, name: str
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the items of all rows that are used, a chunk at a time, and set the report's digest."""
    digest = hashlib.sha256()
    schema = _schema(dataset)
    prepare_chunk = functools.partial(_prepare_chunk, dataset)
    for part, columns in map_rows(prepare_chunk, len(dataset), name=f"{name}: tokenized"):
        report.add(part)
        if part.kept:
            arrays = [_to_arrow(columns[column]) for column in schema.names]
            batch = pyarrow.RecordBatch.from_arrays(arrays, schema=schema)
            _update_digest(digest, batch)
            yield batch
    report.items_digest = digest.hexdigest()


def _to_arrow(column: tuple[np.ndarray, np.ndarray] | np.ndarray) -> pyarrow.Array:
    if isinstance(column, np.ndarray):
        return pyarrow.array(column)
    values, lengths = column
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(values))


def _update_digest(digest: "hashlib._Hash", batch: pyarrow.RecordBatch) -> None:
    """Hash the columns of each row as float64, in the order of their names."""
    columns = []
    for name in sorted(batch.schema.names):
        column = batch.column(name)
        is_list = pyarrow.types.is_list(column.type)
        values = column.flatten() if is_list else column
        ends = column.offsets.to_numpy() if is_list else np.arange(len(column) + 1)
        columns.append((name, values.to_numpy().astype(np.float64), ends.tolist()))
    for row in range(batch.num_rows):
        for name, values, ends in columns:
            begin, end = ends[row], ends[row + 1]
            digest.update(f"{name} {end - begin} ".encode())
            digest.update(values[begin:end])


def _to_json(report: Report) -> dict:
    dropped = np.setdiff1d(np.arange(report.num_rows), np.array(report.kept, dtype=np.int64))
    values = {**vars(report), "left_out": dict(report.left_out), "dropped": dropped.tolist()}
    del values["kept"]
    return values


def _from_json(values: dict) -> Report:
    dropped = values.pop("dropped")
    kept = np.delete(np.arange(values["num_rows"]), np.array(dropped, dtype=np.int64))
    values["left_out"] = Counter(values["left_out"])
    return Report(**values, kept=array("q", kept.tobytes()))


def _key(dataset: TextDataset, folder: Path) -> str | None:
    """Return the name of the prepared rows in the cache, or None if they cannot be named."""
    if not isinstance(dataset.rows, Blend):
        return None
    options = {"kind": type(dataset).__name__, **dataset.options()}
    parts = [json.dumps(options, sort_keys=True).encode(), code_digest()]
    parts.append(_tokenizer_digest(dataset.tokenizer))
    for source, part in dataset.rows.pieces:
        parts.append(part.table.digest(folder))
        parts.append(f"{source.hub_set.name_of_function} {source.reading}".encode())
        parts.append(np.ascontiguousarray(part.index).tobytes())
        parts.append(np.ascontiguousarray(part.pick).tobytes())
    return digest_of(*parts)


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    for text in (words, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)):
        digest.update(text.encode("utf-8", errors="surrogatepass"))
    return digest.digest()
