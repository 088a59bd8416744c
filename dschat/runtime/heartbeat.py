"""The sign of life of a run: a file that rank 0 rewrites after every update.

A supervisor reads it to find a run that hangs, and the update at which a run ended.
"""

import contextlib
import os
from pathlib import Path

NAME = ".heartbeat"
WIDTH = 20  # the length of the file never changes, so it can be written on a full disk


def beat(output_dir: str | Path, step: int) -> None:
    """Write the number of updates (step 3: rollouts) that are done; a failure is ignored."""
    with contextlib.suppress(OSError):
        descriptor = os.open(Path(output_dir) / NAME, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{step:<{WIDTH}}".encode(), 0)
        finally:
            os.close(descriptor)


def last_beat(output_dir: str | Path) -> tuple[int, int] | None:
    """Return the number of updates that are done, and the file's time in ns.

    None: training has not begun.
    """
    path = Path(output_dir) / NAME
    try:
        return int(path.read_text(encoding="utf-8")), path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None


def clear(output_dir: str | Path) -> None:
    """Delete the file, before a run begins and after it has ended."""
    with contextlib.suppress(OSError):
        (Path(output_dir) / NAME).unlink()
