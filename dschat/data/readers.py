"""Local JSON, JSON lines and CSV files to rows that remember their lines.

Our own readers, since those of the libraries name neither the line nor the value of a fault.
"""

import bisect
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

SPACE = re.compile(r"[ \t\r\n]*")


@dataclass
class Records:
    """The objects of a file, the line on which each begins, and what could not be read as one."""

    rows: list[dict] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    lost_behind: Optional[int] = None  # the line behind which rows cannot be told from one another

    def add(self, line: int, value: object) -> None:
        if isinstance(value, dict):
            self.rows.append(value)
            self.lines.append(line)
        else:
            self.faults.append(
                (line, f"an object with named fields is expected, not {json.dumps(value)[:60]}")
            )

    def end(self, line: int, message: str) -> "Records":
        """These records, ended by a fault behind which nothing can be found again."""
        self.faults.append((line, message))
        self.lost_behind = line
        return self


def read_records(path: Path) -> Records:
    """The objects of a .json (one list, or one object a line), .jsonl or .csv (with a header) file.

    Lines count from 1. Faults are collected, not raised.

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
        f"{path}: {path.suffix} is no type of file that is read here; give .json, .jsonl or .csv"
    )


def _read_json_lines(data: bytes) -> Records:
    records = Records()
    # Only \n ends a line: str.splitlines also breaks at U+2028 and others, which may stand inside a JSON text.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.add(number, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            records.faults.append((number, _not_utf8(error)))
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            records.faults.append((number, _not_json(error, line)))
    return records


def _read_json_list(data: bytes) -> Records:
    """The elements of one JSON list. Behind a broken element nothing can be found again, so that reading ends there."""
    records = Records()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return records.end(data[: error.start].count(b"\n") + 1, _not_utf8(error))
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder = json.JSONDecoder()
    position = _behind_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        line = bisect.bisect(newlines, position) + 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            return records.end(line, _not_json(error, text[position : position + 60].encode()))
        records.add(line, value)
        position = _behind_space(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _behind_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    if closed:
        position = _behind_space(text, position + 1)
    if not closed or position < len(text):
        line = bisect.bisect(newlines, position) + 1
        wanted = "nothing more behind the list" if closed else "a comma or the end of the list"
        return records.end(
            line, f"not readable as JSON ({wanted} expected): {text[position : position + 40]!r}"
        )
    return records


def _behind_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()


def _read_csv(data: bytes) -> Records:
    """The rows of a table. Behind a bad quote the next line begins a row, unless the bad one may go on there."""
    records = Records()
    # Bytes that are no UTF-8 become surrogates, which the check of each field finds: a single row is faulty then.
    text = list(io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline=""))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, strict=True)
    header, first_line = None, 1
    torn = None  # the first line that may have left a quote open
    while True:
        cells, message = _next_cells(reader)
        if cells is None and not message:
            return records
        # A whole row has an even number of quotes.
        odd = sum(line.count('"') for line in text[first_line - 1 : reader.line_num]) % 2 == 1
        if message:
            swallowed = odd and reader.line_num > first_line
            if header is None or swallowed or "unexpected end" in message:
                return records.end(first_line, message)
            records.faults.append((first_line, message))
            torn = first_line if odd and torn is None else torn
        elif odd and torn is not None:
            return records.end(
                torn, f"not readable as CSV: its row may end in line {first_line}, at another quote"
            )
        elif header is None:
            header = cells
            twice = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
            if twice:
                records.faults.append(
                    (first_line, f"the header has {', '.join(map(repr, twice))} more than once")
                )
                return records
        elif len(cells) == len(header):
            # Spreadsheets leave columns without a name behind.
            records.add(first_line, {name: cell for name, cell in zip(header, cells) if name})
        elif cells:
            records.faults.append(
                (first_line, f"{len(cells)} cells under a header of {len(header)}: {cells!r:.60}")
            )
        first_line = reader.line_num + 1


def _next_cells(reader) -> tuple[Optional[list[str]], str]:
    """The cells of the next row, None at the end and for a faulty one; and what is wrong with that."""
    try:
        return next(reader, None), ""
    except csv.Error as error:
        return None, f"not readable as CSV: {error}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"


def _not_json(error: Exception, line: bytes) -> str:
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    else:
        reason = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else "a number of too many digits"
        )
    return (
        f"not readable as JSON ({reason}): {line.decode('utf-8', errors='replace').strip()[:60]!r}"
    )
