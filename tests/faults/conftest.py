"""The process from which runs to be killed are forked, one per session; figures for the record."""

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
    """Run mains without starting Python for each; see zygote.py."""
    started = Zygote(stock, tmp_path_factory.mktemp("zygote") / "log")
    yield started
    started.end()


@pytest.fixture
def record(request):
    """Append a test's figures to the file that DSCHAT_FAULT_FIGURES names, if it is set.

    scripts/count_faults.py adds up `injected`, `survived`, `bytes_compared` and `bytes_lost`.
    """

    def keep(**figures) -> None:
        if path := os.environ.get("DSCHAT_FAULT_FIGURES"):
            known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
            write_json(path, {**known, request.node.name: figures})

    return keep
