"""Files read whole and in order, without a split: prompts and pairs for the evaluation programs."""

from dataclasses import replace
from pathlib import Path

from dschat.data.forms import ROW_FAULTS, Reading, read_row
from dschat.data.readers import read_records
from dschat.data.row import Row
from dschat.data.text_checks import describe_fault, validate_text
from dschat.runtime.paths import user_path

FAULTS_SHOWN = 5


def read_rows(path: str, *, flag: str, needs: str | None = None) -> list[Row]:
    """Read the rows of a .jsonl, .json or .csv file, or the prompts of a .txt file.

    A .txt file has one prompt a line; empty lines are skipped.

    Args:
        path: the file.
        flag: the command-line flag that `path` came from, for messages.
        needs: "chosen" or "rejected": the answer that every row must have.

    Raises:
        ValueError: the file is missing or empty, or has rows that cannot be used; names the flag,
            the file and the lines.
    """
    file = user_path(path)
    if not file.is_file():
        raise ValueError(f"{flag} {path}: no such file.")
    if file.suffix == ".txt":
        rows, faults = _read_prompts(file)
    else:
        rows, faults = _read_records(file)
    for row in rows:
        lacks_chosen = needs == "chosen" and row.chosen is None
        lacks_rejected = needs == "rejected" and row.rejected is None
        if lacks_chosen or lacks_rejected:
            faults.append(f'{row.place}: no field "{needs}"')
    if faults:
        shown = faults[:FAULTS_SHOWN]
        if len(faults) > FAULTS_SHOWN:
            shown.append(f"and {len(faults) - FAULTS_SHOWN} more")
        raise ValueError("\n".join(f"{flag} {fault}." for fault in shown))
    if not rows:
        raise ValueError(f"{flag} {path}: no rows in it.")
    return rows


def _read_prompts(file: Path) -> tuple[list[Row], list[str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return [], [f"{file}: not valid UTF-8: {error.reason} at byte {error.start}"]
    rows = []
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            rows.append(Row(validate_text(line.strip("\r"), "prompt"), place=place))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    return rows, faults


def _read_records(file: Path) -> tuple[list[Row], list[str]]:
    records = read_records(file)
    rows = []
    faults = [f"{file}, line {line}: {message}" for line, message in records.faults]
    for line, raw in zip(records.lines, records.rows, strict=True):
        place = f"{file}, line {line}"
        try:
            row = read_row(raw, Reading(bare_text="prompt"))
        except ROW_FAULTS as error:
            faults.append(f"{place}: {describe_fault(error)}")
            continue
        rows.append(replace(row, place=place))
    return rows, faults
