"""The contents of a source's rows: their forms, columns, faults and token counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dschat.data.datasets import IGNORED, TextDataset
from dschat.data.forms import ROW_FAULTS, find_form
from dschat.data.messages import ROLE_FIELDS
from dschat.data.preparation import EncodedRow, Report, encode_rows
from dschat.data.row import Row
from dschat.data.sources import Part, Source, conversation_group
from dschat.data.tables import Fault
from dschat.data.text_checks import describe_fault

SAMPLE_ROWS = 1000
# The texts of a row that each step reads.
READ_TEXTS = {
    1: ("prompt", "chosen", "tools"),
    2: ("prompt", "chosen", "rejected", "tools", "margin"),
    3: ("prompt", "tools"),
}


@dataclass
class Columns:
    """Forms and columns of a source's first rows."""

    num_rows: int = 0
    forms: Counter = field(default_factory=Counter)  # rows by the form that they are read by
    used: Counter = field(default_factory=Counter)  # rows in which each column is used
    unused: Counter = field(default_factory=Counter)  # rows that have a column without a use


@dataclass
class BadRows:
    """Raw rows of a source that make no row."""

    num_rows: int = 0  # raw rows of all parts, the bad ones too
    faults: list[Fault] = field(default_factory=list)
    num_close: int = 0  # rows all of whose pairs are closer than --min_margin


@dataclass
class Example:
    """A row, its prepared item, and its length before truncation."""

    row: Row
    item: dict
    num_tokens: int


@dataclass
class Survey:
    """A summary of a dataset after preparation; `report` is that of `preparation.prepare`."""

    report: Report = field(default_factory=Report)
    lengths: list[int] = field(default_factory=list)  # tokens of every row before truncation
    num_learned: int = 0  # tokens that are learned, of all kept items
    num_item_tokens: int = 0  # tokens of all kept items, of both answers in pairs
    formats: Counter = field(default_factory=Counter)  # rows by text format
    ends: Counter = field(default_factory=Counter)  # rows by what ends their answer
    examples: list[Example] = field(default_factory=list)


def survey_columns(source: Source, *, step: int) -> Columns:
    """Count forms and columns of the first `SAMPLE_ROWS` raw rows of a source.

    A column is used if a row is read by another form or as other texts without it.
    """
    found = Columns()
    memory: dict[tuple, set[str]] = {}
    numbers = np.unique(source.train.index)[:SAMPLE_ROWS]
    for number in numbers:
        raw = source.train.table.rows[int(number)]
        raw = {name: value for name, value in raw.items() if value is not None}
        form = _form_name(source, raw)
        kind = (form, *raw)
        if kind not in memory:
            memory[kind] = _used_columns(source, raw, step=step)
        found.num_rows += 1
        found.forms[form] += 1
        found.used.update(memory[kind])
        found.unused.update(raw.keys() - memory[kind])
    for name in found.used:
        del found.unused[name]
    return found


def find_bad_rows(source: Source) -> BadRows:
    """Read the rows again that `sources.load_source` has left out, and say why."""
    found = BadRows()
    for part in (source.train, source.eval):
        if part is not None:
            _add_bad_rows(found, source, part)
    return found


def survey_rows(dataset: TextDataset, *, num_examples: int, name: str) -> Survey:
    """Encode all rows of a dataset, without keeping them.

    Args:
        dataset: not changed.
        num_examples: keep this many of the first items.
        name: what the rows are, for progress in the log.
    """
    survey = Survey()
    for chunk in encode_rows(dataset, survey.report, name=name, most_faults=None):
        for encoded in chunk:
            _count_row(survey, dataset, encoded, num_examples=num_examples)
    return survey


def _count_row(
    survey: Survey, dataset: TextDataset, encoded: EncodedRow, *, num_examples: int
) -> None:
    survey.formats[dataset.encoder.format.resolve(encoded.row)] += 1
    end = dataset.tokenizer.convert_ids_to_tokens(dataset.encoder.end_id(encoded.rendered))
    survey.ends[end] += 1
    survey.lengths.append(encoded.num_tokens)
    if encoded.item is None:
        return
    num_learned, num_item_tokens = count_learned(encoded.item)
    survey.num_learned += num_learned
    survey.num_item_tokens += num_item_tokens
    if len(survey.examples) < num_examples:
        survey.examples.append(Example(encoded.row, encoded.item, encoded.num_tokens))


def learned_mask(item: dict) -> list[bool]:
    """Return for each token of a prepared SFT item whether it is learned."""
    # A causal model predicts nothing for the first token.
    return [False, *(label != IGNORED for label in item["labels"][1:])]


def count_learned(item: dict) -> tuple[int, int]:
    """Return the number of learned tokens of a prepared item, and the number of all."""
    if "labels" in item:
        return sum(learned_mask(item)), len(item["input_ids"])
    if "chosen_ids" in item:
        num_answers = len(item["chosen_ids"]) + len(item["rejected_ids"])
        return num_answers, num_answers + 2 * len(item["prompt_ids"])
    return 0, len(item["input_ids"])


def _form_name(source: Source, raw: dict) -> str:
    if source.hub_set.row_function is not None:
        return "known by its name"
    return find_form(raw, source.reading).name


def _used_columns(source: Source, raw: dict, *, step: int) -> set[str]:
    """Remove columns as long as the texts stay the same, and return those that are left.

    A column that cannot be removed counts as used if other words in it make other texts.
    """
    texts = _texts(source, raw, step=step)
    left = dict(raw)
    unused: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name in [name for name in left if name not in unused]:
            fewer = {key: value for key, value in left.items() if key != name}
            altered = {**left, name: _alter(left[name])}
            try:
                if _texts(source, fewer, step=step) == texts:
                    left = fewer
                    changed = True
                continue
            except ROW_FAULTS:
                pass
            try:
                if altered != left and _texts(source, altered, step=step) == texts:
                    unused.add(name)
            except ROW_FAULTS:
                continue
    return left.keys() - unused


def _alter(value: object) -> object:
    """Change every text in a value."""
    if isinstance(value, str):
        return f"~{value}~"
    if isinstance(value, list):
        return [_alter(item) for item in value]
    if isinstance(value, dict):
        return {name: item if name in ROLE_FIELDS else _alter(item) for name, item in value.items()}
    return value


def _texts(source: Source, raw: dict, *, step: int) -> tuple:
    """Return all that `step` reads of a raw row, with the form's name."""
    # Rows that --min_margin leaves out use the same columns as others.
    rows = source.hub_set.read(raw, replace(source.reading, min_margin=0.0))
    texts = [[getattr(row, name) for name in READ_TEXTS[step]] for row in rows]
    return _form_name(source, raw), texts


def _add_bad_rows(found: BadRows, source: Source, part: Part) -> None:
    table = part.table
    faults = table.faults
    num_raw = len(table.rows)
    found.num_rows += num_raw + len(faults)
    for number in np.setdiff1d(np.arange(num_raw), part.index):
        try:
            rows = source.hub_set.read(table.rows[int(number)], source.reading)
            for row in rows:
                conversation_group(row)
        except ROW_FAULTS as error:
            faults.append(table.fault(int(number), describe_fault(error)))
        else:
            found.num_close += not rows
    found.faults += sorted(faults)


def percentile(lengths: Sequence[int], share: float) -> int:
    """Return the smallest length that at least `share` of `lengths` do not exceed."""
    return int(np.quantile(lengths, share, method="inverted_cdf"))
