"""One run a folder: a lock that the system takes back when its process ends, however it ends."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from dschat.runtime.log import logger

LOCK = ".lock"
_held: dict[Path, int] = {}  # folder -> open file; a lock lives as long as its file is open


def lock_folder(folder: Path) -> None:
    """Hold `folder` until this process ends.

    Raises:
        BlockingIOError: another process holds it; the message names it.
    """
    folder = folder.resolve()
    if folder not in _held:
        _held[folder] = _lock(folder)


@contextlib.contextmanager
def locked(folder: Path):
    """Hold `folder` inside, in a process that does not hold it otherwise; raises as ``lock_folder`` does."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """The open file with which `folder` is held."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise BlockingIOError(f"another run writes to it ({holder})") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning(
            f"{folder}: cannot be locked ({error.strerror}): see yourself that no other run writes to it"
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
