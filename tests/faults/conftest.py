"""One process for the session, from which all runs that are to be killed are forked; and figures for the record."""

import json
import os
import sys
from pathlib import Path

import pytest

from dschat.runtime.files import write_json

sys.path.insert(0, str(Path(__file__).parent))

from runs import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def zygote(stock, tmp_path_factory):
    """Runs of the mains that cost no start of Python; see zygote.py."""
    started = Zygote(stock, tmp_path_factory.mktemp("zygote") / "log")
    yield started
    started.end()


@pytest.fixture
def record(request):
    """Keeps a test's figures: in the file that DSCHAT_FAULT_FIGURES names, where it does. scripts/count_faults.py adds up
    `injected`, `survived`, `bytes_compared` and `bytes_lost`.
    """

    def keep(**figures) -> None:
        if path := os.environ.get("DSCHAT_FAULT_FIGURES"):
            known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
            write_json(path, {**known, request.node.name: figures})

    return keep
