"""Files that are read whole and in order, outside of any split: prompts and pairs for the evaluation programs."""

from pathlib import Path
from typing import Optional

from dschat.data.readers import read_records
from dschat.data.row import Row, checked_text, row_from_columns
from dschat.runtime.paths import user_path

FAULTS_SHOWN = 5


def read_rows(path: str, *, flag: str, needs: Optional[str] = None) -> list[Row]:
    """The rows of a .jsonl, .json or .csv file, or the prompts of a .txt file, one a line (empty lines do not count).

    Args:
        flag: the command-line flag that `path` came from, for messages.
        needs: "chosen" or "rejected": the answer that every row must have.

    Raises:
        ValueError: no such file, nothing in it, or rows that cannot be used; names the flag, the file and the lines.
    """
    file = user_path(path)
    if not file.is_file():
        raise ValueError(f"{flag} {path}: no such file.")
    rows, faults = (_text_rows if file.suffix == ".txt" else _record_rows)(file)
    for row in rows:
        if needs and getattr(row, needs) is None:
            faults.append(f'{row.place}: no field "{needs}"')
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        raise ValueError("\n".join(f"{flag} {fault}." for fault in faults[:FAULTS_SHOWN] + more))
    if not rows:
        raise ValueError(f"{flag} {path}: no rows in it.")
    return rows


def _text_rows(file: Path) -> tuple[list[Row], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return [], [f"{file}: not valid UTF-8: {error.reason} at byte {error.start}"]
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            rows.append(Row(checked_text(line.strip("\r"), "prompt"), place=place))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    return rows, faults


def _record_rows(file: Path) -> tuple[list[Row], list[str]]:
    records = read_records(file)
    rows, faults = [], [f"{file}, line {line}: {message}" for line, message in records.faults]
    for line, raw in zip(records.lines, records.rows):
        place = f"{file}, line {line}"
        try:
            row = row_from_columns(raw)
        except ValueError as error:
            faults.append(f"{place}: {error}")
            continue
        rows.append(Row(row.prompt, row.chosen, row.rejected, row.columns, place))
    return rows, faults
