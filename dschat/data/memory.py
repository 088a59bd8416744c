"""Rows in memory, opened as the tables that files become: lists of dictionaries, and datasets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets

from dschat.data.readers import Records
from dschat.data.tables import Chunk, Table

# The parts of a DatasetDict that are evaluated on, the best first.
EVAL_PARTS = ("eval", "test", "validation")
# A list of rows (dictionaries, or texts), a datasets.Dataset, or for both parts a DatasetDict.
RowsInMemory: TypeAlias = Sequence[Any] | datasets.Dataset | datasets.DatasetDict


def tables_in_memory(
    train: RowsInMemory,
    evaluation: RowsInMemory | None = None,
    *,
    names: tuple[str, str] = ("train_dataset", "eval_dataset"),
) -> dict[str, Table]:
    """Return the tables "train" and, if there are evaluation rows, "eval".

    Args:
        train: training rows; a DatasetDict gives its parts train and eval, test or validation.
        evaluation: evaluation rows, which win over those of a DatasetDict; None: a share of the
            training rows is held out.
        names: of the two, for messages: "train_dataset, row 7".

    Raises:
        ValueError: they are of another type, or a DatasetDict without a part train.
    """
    if isinstance(train, datasets.DatasetDict):
        train, evaluation = _parts(train, evaluation, names[0])
    tables = {"train": _table(train, names[0])}
    if evaluation is not None:
        tables["eval"] = _table(evaluation, names[1])
    return tables


def _parts(
    parts: datasets.DatasetDict, evaluation: RowsInMemory | None, name: str
) -> tuple[datasets.Dataset, RowsInMemory | None]:
    """Return the training and the evaluation rows of a DatasetDict."""
    if "train" not in parts:
        raise ValueError(
            f"{name}: its parts are {', '.join(parts)}, and none is called train. Give one of them."
        )
    if evaluation is None:
        evaluation = next((parts[part] for part in EVAL_PARTS if part in parts), None)
    return parts["train"], evaluation


def _table(rows: RowsInMemory, name: str) -> Table:
    if isinstance(rows, datasets.Dataset):
        # A format, such as torch's, would give rows that are no plain values.
        return Table(rows.with_format(None), name, (Chunk(name, len(rows)),))
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sequence):
        raise ValueError(
            f"{name} is of the type {type(rows).__name__}: give a list of dictionaries or a "
            "datasets.Dataset (of pandas: datasets.Dataset.from_pandas; of an IterableDataset: "
            "list(rows))."
        )
    records = Records()
    for number, row in enumerate(rows, start=1):
        records.add(number, dict(row) if isinstance(row, Mapping) else row)
    chunk = Chunk(
        name,
        len(records.rows),
        lines=records.lines,
        unit="row",
        faults=tuple(records.faults),
    )
    return Table(records.rows, name, (chunk,), content=_digest(records.rows))


def _digest(rows: list[dict]) -> bytes:
    """Return a hash of rows; values that JSON does not know count by their repr."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=repr).encode())
        digest.update(b"\n")
    return digest.digest()
