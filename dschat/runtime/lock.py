"""A lock that lets one run at a time write to a folder.

The system releases it when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dschat.runtime.log import logger

LOCK = ".lock"
_held: dict[Path, int] = {}  # folder -> open file; the lock is held while the file is open


def lock_folder(folder: Path) -> None:
    """Lock `folder` until this process ends, or ``unlock_folder``.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
    """
    folder = folder.resolve()
    if folder not in _held:
        _held[folder] = _lock(folder)


def unlock_folder(folder: Path) -> None:
    """Release the lock of `folder`, if this process holds it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` inside the context, in a process that has not locked it already.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock `folder` and return the descriptor of the open lock file."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise BlockingIOError(f"another run writes to it ({holder})") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning(
            f"{folder}: cannot be locked ({error.strerror}). "
            "Make sure that no other run writes to it."
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
