"""Names of files in the cache: hashes of all that decides what is in them."""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np

from dschat.runtime.manifest import file_entry
from dschat.runtime.paths import cache_dir, user_path

logger = logging.getLogger(__name__)

SETTLED_NS = 2 * 10**9


def prepared_folder(folder: str | Path | None) -> Path:
    """Return the folder of prepared rows in `folder`, or in the user's cache if it is None."""
    return (user_path(folder) if folder else cache_dir()) / "prepared"


def digest_of(*parts: bytes) -> str:
    """Return a name for a file that `parts` decide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def file_digest(path: str | Path, folder: Path) -> bytes:
    """Return a hash of a file's content.

    It is kept in `folder`: a file whose inode, size and times are as before is not read again.
    """
    status = os.stat(path)
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return _file_digest(os.path.abspath(path), identity, folder)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, identity: tuple[int, ...], folder: Path) -> bytes:
    known = folder / f"{digest_of(f'{path} {identity}'.encode())}.sha256"
    try:
        return known.read_bytes()
    except OSError:
        pass
    found = file_entry(Path(path))["sha256"].encode()
    # A file that was written a moment ago may change again within one tick of its clock.
    if time.time_ns() - max(identity[-2:]) > SETTLED_NS:
        _keep(known, lambda temporary: temporary.write_bytes(found))
    return found


def keep_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to the cache; log a warning if that fails."""
    _keep(file, lambda temporary: np.savez(temporary, **arrays))  # type: ignore[arg-type]


def _keep(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f"{file.stem}.{os.getpid()}{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, file)
    except OSError as error:
        logger.warning("%s: the cache cannot be written (%s)", file, error)


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Let one process of this host after the other make `file`, if its folder can be written."""
    lock = filelock.FileLock(file.with_suffix(".lock"))
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        except OSError:
            pass
        yield


@functools.cache
def code_digest() -> bytes:
    """Return a hash of this package's code: a change of it makes the rows again."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()
