"""Fixtures that the unit tests share."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from dschat.runtime.log import logger


@pytest.fixture(scope="module")
def e2e():
    """Load e2e_rlhf.py as a module, once per test file."""
    path = Path(__file__).resolve().parents[2] / "e2e_rlhf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_rank_1(monkeypatch):
    """Set the launcher's rank to 1, without a process group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """Collect the messages of the package's logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
