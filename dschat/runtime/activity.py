"""Progress of long work: the work reports counts, and a caller that watches it shows them.

``report`` costs about a microsecond, and does nothing unless somebody watches.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Watcher(Protocol):
    """A receiver of counts, each as (done, total)."""

    def __call__(self, **counts: tuple[int, int]) -> None:
        """Take the newest counts, by name."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def report(**counts: tuple[int, int]) -> None:
    """Give counts, each as (done, total), to the watcher."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(**counts)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Give what is reported in the block to `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def part_of(**counts: tuple[int, int]) -> Iterator[None]:
    """Put `counts` before those that are reported in the block."""
    outer = _watcher.get()
    if outer is None:
        yield
        return
    with watched(functools.partial(outer, **counts)):
        yield
