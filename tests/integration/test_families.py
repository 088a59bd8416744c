"""The steps on miniatures of the families of transformers, by ZeRO stage and with LoRA.

A few families run in a pairwise cover. All of them run with

    FAMILIES_JSON=docs/results/families.json pytest tests/integration/test_families.py -m slow

which also writes the table that docs/models.md shows.
"""

import json
import os
from pathlib import Path

import pytest
from covers import pairwise, product
from family_checks import SETTINGS
from launches import Case, failing

from tests.tiny_families import COMMON, RARE

# Dense with sliding windows and caps, convolutions, and two mixtures with experts of either layout.
FEW = ("gemma2", "lfm2", "qwen3_moe", "gpt_oss")
STEPS = (1, 2, "dpo", 3)
NO_CLASSIFIER = "modernbert-decoder"  # its classifier has another head


def family_case(family: str, step: int | str, setting: str) -> Case:
    return Case(
        f"family-{family}-{step}-{setting}",
        ranks=2,
        function="family_checks.py:train_family",
        kwargs={
            "stock": "{stock}",
            "family": family,
            "step": step,
            "setting": setting,
            "out": "{out}",
        },
    )


def params() -> list:
    """Return a pairwise cover of a few families and, marked slow, all combinations."""
    axes = {"family": FEW, "step": STEPS, "setting": tuple(SETTINGS)}
    few = [(row["family"], row["step"], row["setting"]) for row in pairwise(axes)]
    full = [
        (row["family"], row["step"], row["setting"])
        for row in product({**axes, "family": (*COMMON, *RARE)})
        if row["family"] != NO_CLASSIFIER or row["step"] not in (2, 3)
    ]
    found = []
    for row in dict.fromkeys(few + full):
        case = family_case(*row)
        marks = [pytest.mark.cases(case)] + ([] if row in few else [pytest.mark.slow])
        found.append(pytest.param(row, case, id=case.name[7:], marks=marks))
    return found


@pytest.fixture(scope="module")
def table():
    """Outcomes by family; written to the file that FAMILIES_JSON names, if any."""
    found: dict[str, dict[str, str]] = {}
    yield found
    path = os.environ.get("FAMILIES_JSON")
    if path:
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("row, case", params())
def test_a_family_trains(row, case, launches, table):
    family, step, setting = row
    outcomes, name = table.setdefault(family, {}), f"{step} {setting}, {case.ranks} ranks"
    outcomes[name] = "no result"
    failed = failing(launches, case)
    outcomes[name] = "; ".join(failed) or "ok"
    assert failed == []
