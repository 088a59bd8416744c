"""The table of models and cards in the documentation is that of the plan."""

from pathlib import Path

import pytest

from dschat.memory.cards import CONFIGS, MEASURED, MODELS, WAYS, card_cell

PAGE = Path(__file__).resolve().parents[3] / "docs" / "performance" / "memory.md"


def documented() -> dict[tuple[str, str], list[str]]:
    """Return the cells of the table in the documentation, by step and model."""
    section = PAGE.read_text(encoding="utf-8").split("## Which model on which card")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["step", "model", *WAYS]
    return {(row[0], row[1]): row[2:] for row in rows[1:]}


@pytest.mark.parametrize(
    "step, model",
    [("1", "llama-2-7b"), ("2", "opt-1.3b"), ("dpo", "opt-1.3b"), ("3", "llama-2-7b")],
)
def test_the_documented_cells_are_the_plans(step, model):
    cells = documented()[step, model]
    assert cells == [card_cell(step, model, way) for way in WAYS]


def test_the_table_is_complete_and_marks_measured_kinds_alone():
    table = documented()
    assert list(table) == [(step, model) for step in CONFIGS for model in MODELS]
    stars = {
        (step, model, way)
        for (step, model), cells in table.items()
        for way, cell in zip(WAYS, cells, strict=True)
        if cell.endswith("*")
    }
    assert stars == MEASURED
