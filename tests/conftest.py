"""Launches for the tests that need a process group.

All cases with the same number of ranks share one launch, whichever file asks first. A test names
its cases by the mark ``cases`` and reads the results from the fixture ``launches``:

    @pytest.mark.cases(CASE)
    def test_it(launches):
        assert launches[CASE].metrics()[-1]["step"] == 3

Only cases that a selected test names are run.
"""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "integration"))

from launches import Case, Launches  # noqa: E402
from stock import write_stock  # noqa: E402

# Background jobs of a shell ignore Ctrl-C, and so would the runs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--model",
        help="test_step3_matrix.py: a causal language model's folder, instead of a miniature",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cases(*cases): the launched cases whose results the test reads"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let one worker of pytest-xdist run all tests that launch runs, in order.

    They share launches and take both cores. The other workers run the unit tests, file by file.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.startswith("tests/unit/") else "launches"

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def stock(request, tmp_path_factory) -> Path:
    """Return the folder of miniature models and toy data, which is read-only; see stock.py."""
    return write_stock(
        tmp_path_factory.mktemp("stock"), matrix_model=request.config.getoption("--model")
    )


@pytest.fixture(scope="session")
def launches(request, stock, tmp_path_factory) -> Launches:
    """Return the results of all launched cases, by case."""
    named = [
        case
        for item in request.session.items
        for mark in item.iter_markers("cases")
        for case in mark.args
    ]
    cases: list[Case] = list({case.name: case for case in named}.values())
    return Launches(cases, folder=tmp_path_factory.mktemp("cases"), stock=stock)
