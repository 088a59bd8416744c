"""Names of files in the cache: hashes of all that decides what is in them."""

import functools
import hashlib
import os
from pathlib import Path

import datasets

from dschat.data.tables import Table
from dschat.runtime.manifest import file_entry
from dschat.runtime.paths import cache_dir, user_path


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


def table_digest(table: Table) -> bytes:
    """Return a hash of a table's content."""
    if isinstance(table.rows, datasets.Dataset):
        return table.rows._fingerprint.encode()
    parts = []
    for chunk in table.chunks:
        status = os.stat(chunk.title)
        parts.append(_file_digest(chunk.title, status.st_size, status.st_mtime_ns))
    return b"".join(parts)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, modified: int) -> bytes:
    """Hash a file once in a process, unless its size or time changes."""
    return file_entry(Path(path))["sha256"].encode()


@functools.cache
def code_digest() -> bytes:
    """Return a hash of this package's code: a change of it makes the rows again."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()
