"""One process for the session, from which all runs that are to be killed are forked."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def zygote(stock, tmp_path_factory):
    """Runs of the mains that cost no start of Python; see zygote.py."""
    started = Zygote(stock, tmp_path_factory.mktemp("zygote") / "log")
    yield started
    started.end()
