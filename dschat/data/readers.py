"""Readers of local JSON, JSON lines and CSV files that remember the line of each row.

The readers of the libraries report neither the line nor the value of a fault.
"""

import bisect
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

SPACE = re.compile(r"[ \t\r\n]*")


@dataclass
class Records:
    """The objects of a file, the line where each begins, and what could not be read."""

    rows: list[dict] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)  # (line, message)
    lost_after: int | None = None  # the line after which rows cannot be told from one another

    def add(self, line: int, value: object) -> None:
        """Add a row, or a fault if `value` is not an object."""
        if isinstance(value, dict):
            self.rows.append(value)
            self.lines.append(line)
        else:
            shown = json.dumps(value)[:60]
            self.faults.append((line, f"an object with named fields is expected, not {shown}"))

    def stop(self, line: int, message: str) -> "Records":
        """Add a fault after which no row can be found, and return these records."""
        self.faults.append((line, message))
        self.lost_after = line
        return self


def read_records(path: Path) -> Records:
    """Read the objects of a .json, .jsonl or .csv file.

    A .json file holds one list, or one object a line. A .csv file begins with a header. Lines count
    from 1. Faults are collected, not raised.

    Raises:
        ValueError: for another suffix, or a file that cannot be opened.
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if path.suffix == ".csv":
        return _read_csv(data)
    if path.suffix == ".json" and data.lstrip()[:1] == b"[":
        return _read_json_list(data)
    if path.suffix in (".json", ".jsonl"):
        return _read_json_lines(data)
    raise ValueError(
        f"{path}: files of type {path.suffix} cannot be read; give .json, .jsonl or .csv"
    )


def _read_json_lines(data: bytes) -> Records:
    records = Records()
    # Only \n ends a line: str.splitlines also breaks at U+2028 and others, which JSON strings may
    # contain.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.add(number, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            records.faults.append((number, _describe_decode_error(error)))
        except (ValueError, RecursionError) as error:  # ValueError: also for thousands of digits
            records.faults.append((number, _describe_json_error(error, line)))
    return records


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
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = error.lineno
            shown = text[position : position + 60].encode()
            return records.stop(line, _describe_json_error(error, shown))
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
        shown = text[position : position + 40]
        return records.stop(line, f"not readable as JSON ({expected} expected): {shown!r}")
    return records


def _skip_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()


def _read_csv(data: bytes) -> Records:
    """Read a table.

    After a bad quote, the next line begins a new row, unless the bad row may continue there.
    """
    records = Records()
    # Invalid UTF-8 becomes surrogates, which the check of each field finds: then only that row is
    # faulty.
    text = list(io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline=""))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, strict=True)
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
            repeated = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
            if repeated:
                names = ", ".join(map(repr, repeated))
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


def _describe_decode_error(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"


def _describe_json_error(error: Exception, line: bytes) -> str:
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        reason = "nested too deeply"
    else:
        reason = "a number of too many digits"
    shown = line.decode("utf-8", errors="replace").strip()[:60]
    return f"not readable as JSON ({reason}): {shown!r}"
