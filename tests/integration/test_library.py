"""The trainers that programs and notebooks call: the runs of the mains, and exact resumption."""

import pytest
from launches import Case, failing

FUNCTIONS = {"sft": 2, "ppo": 2, "documents": 1}
CASES = {
    name: Case(
        f"library-{name}",
        ranks=ranks,
        function=f"library_checks.py:{name}",
        kwargs={"stock": "{stock}", "out": "{out}"},
    )
    for name, ranks in FUNCTIONS.items()
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.cases(case)) for name, case in CASES.items()],
)
def test_the_trainers(case, launches):
    assert failing(launches, case) == []
