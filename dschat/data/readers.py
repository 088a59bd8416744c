"""Readers of local JSON, JSON lines, CSV and TSV files that remember the line of each row.

The readers of the libraries report neither the line nor the value of a fault.
"""

import bisect
import csv
import gzip
import io
import json
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dschat.data.cache import code_digest, digest_of, file_digest, keep_arrays, one_at_a_time

BOM = b"\xef\xbb\xbf"
BARE_TEXT = "(a line that is one text)"  # the column of a row that is a string, not an object
CACHED_BYTES = 2**23  # finding the lines of a smaller file again is faster than a cache is worth
BLOCK = 2**17  # bytes that are read at once

SPACE = re.compile(r"[ \t\r\n]*")
JSON_LINES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (".json", *JSON_LINES, ".csv", ".tsv")
COMPRESSED_SUFFIXES = tuple(
    suffix + compression for suffix in RECORD_SUFFIXES for compression in (".gz", ".zst")
)
# Levels of lists and objects in a row. Code that walks through a row calls itself for each level.
MAX_DEPTH = 200
NAMES_SHOWN = 5
# Fields under which exports put their list of rows.
WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "train")


class LineRows(Sequence):
    """The rows of a file with one JSON object a line, read when they are asked for.

    Only the place of each line is in memory: a million rows take 16 MB.
    """

    def __init__(self, path: Path, begins: array | None = None, lengths: array | None = None):
        self.path = path
        self.begins = array("q") if begins is None else begins
        self.lengths = array("q") if lengths is None else lengths
        self._file: BinaryIO | None = None
        self._block: tuple[int, bytes] = (0, b"")  # bytes of the file, and where they begin

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.begins)

    def __getitem__(self, index: Any) -> dict:  # type: ignore[override]
        """Read a row."""
        value = json.loads(self._read(self.begins[index], self.lengths[index]).decode("utf-8"))
        return {BARE_TEXT: value} if isinstance(value, str) else value

    def _read(self, begin: int, length: int) -> bytes:
        """Read bytes of the file, and keep what is around them: the next row is likely there."""
        block_begin, block = self._block
        if begin < block_begin or begin + length > block_begin + len(block):
            if self._file is None:
                self._file = self.path.open("rb")
            # Without a shared position, so that forked workers may read too.
            block_begin, block = begin, os.pread(self._file.fileno(), max(length, BLOCK), begin)
            self._block = block_begin, block
        return block[begin - block_begin : begin - block_begin + length]

    def __getstate__(self) -> dict:
        """Leave the open file out of copies for other processes."""
        return {**self.__dict__, "_file": None, "_block": (0, b"")}

    def add(self, begin: int, length: int) -> None:
        """Add the row in the bytes [begin, begin + length)."""
        self.begins.append(begin)
        self.lengths.append(length)


@dataclass
class Records:
    """The objects of a file, the line where each begins, and what could not be read."""

    rows: Any = field(default_factory=list)  # list of dict, or LineRows
    lines: Any = field(default_factory=list)  # list or array of int
    faults: list[tuple[int, str]] = field(default_factory=list)  # (line, message)
    lost_after: int | None = None  # the line after which rows cannot be told from one another

    def add(self, line: int, value: object) -> None:
        """Add a row, or a fault if `value` is not an object."""
        if isinstance(value, str):
            value = {BARE_TEXT: value}
        if isinstance(value, dict):
            self.rows.append(value)
            self.lines.append(line)
        else:
            self.faults.append((line, _describe_other(value)))

    def stop(self, line: int, message: str) -> "Records":
        """Add a fault after which no row can be found, and return these records."""
        self.faults.append((line, message))
        self.lost_after = line
        return self


def file_suffix(path: Path) -> str:
    """Return the suffix of a file, including that of its compression: ".jsonl.gz"."""
    compressed = path.suffix in (".gz", ".zst")
    return "".join(path.suffixes[-2:]) if compressed else path.suffix


def read_records(path: Path, *, cache_folder: Path | None = None) -> Records:
    """Read the objects of a .json, .jsonl, .ndjson, .csv or .tsv file, or of one in .gz or .zst.

    A .json file holds one list, or one object a line. A .csv or .tsv file begins with a header.
    Lines count from 1. Faults are collected, not raised.

    Args:
        path: the file.
        cache_folder: keep the places of a large file's lines here; None: find them each time.

    Raises:
        ValueError: for another suffix, a file that cannot be opened or decompressed, or a .json
            file that is one object of rows or columns.
    """
    suffix = file_suffix(path)
    if suffix not in RECORD_SUFFIXES + COMPRESSED_SUFFIXES:
        raise ValueError(
            f"{path}: files of type {suffix or 'no suffix'} cannot be read; give "
            f"{', '.join(RECORD_SUFFIXES)}, or one of them with .gz or .zst"
        )
    if suffix in JSON_LINES:
        return _read_line_file(path, cache_folder)
    data = _read_bytes(path).removeprefix(BOM)
    kind = suffix.removesuffix(".gz").removesuffix(".zst")
    if kind in (".csv", ".tsv"):
        return _read_csv(data, delimiter="\t" if kind == ".tsv" else ",")
    if kind == ".json":
        if data.lstrip()[:1] == b"[":
            return _read_json_list(data)
        _refuse_other_json(path, data)
    return _read_json_lines(data)


def _read_bytes(path: Path) -> bytes:
    """Read a file, and decompress it if its suffix is .gz or .zst."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if path.suffix == ".gz":
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: not readable as gzip ({error}). Copy or compress it again."
            ) from error
    if path.suffix == ".zst":
        return _decompress_zstd(path, data)
    return data


def _decompress_zstd(path: Path, data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"{path}: reading .zst files needs the package zstandard, which is not installed. Run "
            "pip install zstandard, or decompress the file."
        ) from error
    try:
        # A file may have several frames. A stream reader takes the end of the file for that of a
        # frame; only the object below knows whether a frame was whole.
        parts = []
        while data:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(data))
            if not frame.eof:
                raise zstandard.ZstdError("the file ends too early")
            data = frame.unused_data
    except zstandard.ZstdError as error:
        raise ValueError(
            f"{path}: not readable as Zstandard ({error}). Copy or compress it again."
        ) from error
    return b"".join(parts)


def _refuse_other_json(path: Path, data: bytes) -> None:
    """Raise ValueError if a file is one object that holds rows or columns, and not a row."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # several objects, or faults that are reported by line
        return
    if not isinstance(value, dict) or not value:
        return
    wrapper = next((name for name in WRAPPERS if _is_list_of_rows(value.get(name))), None)
    if wrapper:
        found = f'one object with the rows under "{wrapper}"'
        remedy = f'Save the list under "{wrapper}" alone'
    elif _is_columns(list(value.values())):
        found = "one object of columns"
        remedy = 'Save its rows (pandas: to_json(path, orient="records"))'
    else:
        return
    raise ValueError(
        f'{path}: it holds {found}. Expected is one list of rows, [{{"prompt": ...}}, ...], or one '
        f"row a line. {remedy}."
    )


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _is_columns(values: list) -> bool:
    """Return whether `values` are columns, as lists or as pandas' {"0": ..., "1": ...}.

    A row of messages is a list of objects too, so lists of objects are no columns.
    """
    if all(isinstance(value, list) for value in values):
        same_length = len({len(value) for value in values}) == 1
        return same_length and not any(isinstance(cell, dict) for cell in values[0])
    return all(
        isinstance(value, dict) and value and all(key.isdigit() for key in value)
        for value in values
    )


def _read_json_lines(data: bytes) -> Records:
    records = Records()
    # Only \n ends a line: str.splitlines also breaks at U+2028 and others, which JSON strings may
    # contain.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            value = _parse_line(records, number, line)
            if value is not None:
                records.rows.append(value)
                records.lines.append(number)
    return records


def _read_line_file(path: Path, cache_folder: Path | None) -> Records:
    """Find the rows of a file with one object a line, or take their places from the cache."""
    try:
        if cache_folder is None or path.stat().st_size < CACHED_BYTES:
            return _find_lines(path)
        name = digest_of(b"lines", file_digest(path, cache_folder), code_digest())
        places = cache_folder / f"{name}.npz"
        with one_at_a_time(places):
            if places.is_file():
                return _load_lines(path, places)
            records = _find_lines(path)
            _keep_lines(records, places)
        return records
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _find_lines(path: Path) -> Records:
    """Parse each line once, for its faults."""
    rows = LineRows(path)
    records = Records(rows=rows, lines=array("q"))
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
            text = line[skipped:]
            if text.strip() and _parse_line(records, number, text) is not None:
                rows.add(begin + skipped, len(text))
                records.lines.append(number)
            begin += len(line)
    return records


def _keep_lines(records: Records, places: Path) -> None:
    columns = (records.rows.begins, records.rows.lengths, records.lines)
    arrays = {"places": np.array(columns, dtype=np.int64)}
    arrays["faults"] = np.array(json.dumps(records.faults))
    keep_arrays(places, arrays)


def _load_lines(path: Path, places: Path) -> Records:
    with np.load(places, allow_pickle=False) as arrays:
        begins, lengths, lines = (array("q", column.tobytes()) for column in arrays["places"])
        faults = [(line, message) for line, message in json.loads(str(arrays["faults"]))]
    return Records(LineRows(path, begins, lengths), lines, faults)


def _parse_line(records: Records, number: int, line: bytes) -> dict | None:
    """Return the object in a line; None, after adding a fault to `records`, if there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        records.faults.append((number, _describe_decode_error(error)))
        return None
    except (ValueError, RecursionError) as error:  # ValueError: also for thousands of digits
        records.faults.append((number, _describe_json_error(error, line)))
        return None
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(value):
        records.faults.append((number, _describe_json_error(RecursionError(), line)))
        return None
    if isinstance(value, str):
        return {BARE_TEXT: value}
    if not isinstance(value, dict):
        records.faults.append((number, _describe_other(value)))
        return None
    return value


def _is_deep(value: object) -> bool:
    """Return whether lists and objects are nested more than MAX_DEPTH levels deep in `value`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)


def _read_json_list(data: bytes) -> Records:
    """Read one JSON list, up to the first broken element: no row can be found after that."""
    records = Records()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return records.stop(data[: error.start].count(b"\n") + 1, _describe_decode_error(error))
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        line = bisect.bisect(newlines, position) + 1
        try:
            begin = position
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = error.lineno
            shown = text[position : position + 60].encode()
            return records.stop(line, _describe_json_error(error, shown))
        openings = text.count("[", begin, position) + text.count("{", begin, position)
        if openings > MAX_DEPTH and _is_deep(value):
            shown = text[begin : begin + 60].encode()
            records.faults.append((line, _describe_json_error(RecursionError(), shown)))
        else:
            records.add(line, value)
        position = _skip_space(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    if closed:
        position = _skip_space(text, position + 1)
    if not closed or position < len(text):
        line = bisect.bisect(newlines, position) + 1
        expected = "nothing more after the list" if closed else "a comma or the end of the list"
        rest = text[position : position + 40]
        return records.stop(line, f"not readable as JSON ({expected} expected): {rest!r}")
    return records


def _skip_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()


def _read_csv(data: bytes, delimiter: str) -> Records:
    """Read a table.

    After a bad quote, the next line begins a new row, unless the bad row may continue there.
    """
    records = Records()
    # Invalid UTF-8 becomes surrogates, which the check of each field finds: then only that row is
    # faulty.
    text = list(io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline=""))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = None
    first_line = 1
    open_line = None  # the first line that may have left a quote open
    while True:
        cells, message = _read_cells(reader)
        if cells is None and not message:
            return records
        # A whole row has an even number of quotes.
        num_quotes = sum(line.count('"') for line in text[first_line - 1 : reader.line_num])
        odd = num_quotes % 2 == 1
        if message:
            swallowed = odd and reader.line_num > first_line
            if header is None or swallowed or "unexpected end" in message:
                return records.stop(first_line, message)
            records.faults.append((first_line, message))
            if odd and open_line is None:
                open_line = first_line
        elif odd and open_line is not None:
            return records.stop(
                open_line,
                f"not readable as CSV: its row may end in line {first_line}, at another quote",
            )
        elif header is None:
            header = cells
            repeated = sorted(name for name, count in Counter(cells).items() if name and count > 1)
            if repeated:
                names = ", ".join(map(repr, repeated[:NAMES_SHOWN]))
                if len(repeated) > NAMES_SHOWN:
                    names += f" and {len(repeated) - NAMES_SHOWN} others"
                records.faults.append((first_line, f"the header has {names} more than once"))
                return records
        elif len(cells) == len(header):
            # Spreadsheets may leave columns without a name.
            row = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            records.add(first_line, row)
        elif cells:
            message = f"{len(cells)} cells under a header of {len(header)}: {cells!r:.60}"
            records.faults.append((first_line, message))
        first_line = reader.line_num + 1


def _read_cells(reader) -> tuple[list[str] | None, str]:
    """Read the next row: its cells (None at the end or on a fault), and the fault, if any."""
    try:
        return next(reader, None), ""
    except csv.Error as error:
        return None, f"not readable as CSV: {error}"


def _describe_other(value: object) -> str:
    shown = json.dumps(value, default=repr)[:60]
    return f"an object with named fields, or a text, is expected, not {shown}"


def _describe_decode_error(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"


def _describe_json_error(error: Exception, line: bytes) -> str:
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        reason = f"nested too deeply, the limit is {MAX_DEPTH} levels"
    else:
        reason = "a number of too many digits"
    shown = line.decode("utf-8", errors="replace").strip()[:60]
    return f"not readable as JSON ({reason}): {shown!r}"
