"""Lets the tests of this folder import its helpers by name, which pytest's importlib mode does not; and what they share."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def e2e():
    """The module e2e_rlhf.py, anew for each file."""
    path = Path(__file__).resolve().parents[2] / "e2e_rlhf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
