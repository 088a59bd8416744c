"""Fixtures that the unit tests share."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def e2e():
    """The module e2e_rlhf.py, loaded again for each test file."""
    path = Path(__file__).resolve().parents[2] / "e2e_rlhf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_rank_1(monkeypatch):
    """A process that the launcher calls rank 1, before it has joined a group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
