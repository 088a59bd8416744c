"""A folder's manifest: the size and sha256 of each of its files.

The manifest is written last: a folder without one is incomplete, and a folder that differs from its
manifest is damaged.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dschat.runtime.files import fsync, write_json

MANIFEST = "manifest.json"
CHUNK = 2**24


class HashingFile:
    """A file that is written sequentially and hashed on the way.

    After it is closed it is on disk, and its size and sha256 are known.
    """

    def __init__(self, path: str | Path):
        self._file = open(path, "wb")  # noqa: SIM115
        self._sum = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write bytes and return their number."""
        self._sum.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush Python's buffer."""
        self._file.flush()

    def __enter__(self) -> "HashingFile":
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush the file to disk and close it."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in a manifest."""
        return {"size": self.size, "sha256": self._sum.hexdigest()}


def file_entry(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a file on disk."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        size = 0
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `folder` and flush both to disk.

    Args:
        folder: a folder whose files are on disk.
        entries: the entry of each file, by its path relative to `folder`.
    """
    write_json(folder / MANIFEST, {"files": entries})
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(inner)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the manifest of `folder`, and check the names and sizes of the files against it.

    Returns:
        The entry of each file, by its path relative to `folder`.

    Raises:
        ValueError: there is no readable manifest, or a file differs from it. The message names the
            file.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["size"] for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MANIFEST} is missing or not readable ({type(error).__name__})"
        ) from error
    # Only files that are found here are opened, whatever names the manifest holds.
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(folder)} is not a regular file")
        if path.is_file() and path != folder / MANIFEST:
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    for name in sorted(set(sizes) | set(found)):
        if name not in found or name not in sizes:
            fault = "missing" if name not in found else f"not in {MANIFEST}"
            raise ValueError(f"{name} is {fault}")
        if found[name] != sizes[name]:
            raise ValueError(f"{name} has {found[name]} bytes, not {sizes[name]}")
    return dict(entries)


def content_fault(folder: Path, entries: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Check the content of the files `names` of `folder`; return a fault, or ""."""
    for name in names:
        try:
            if file_entry(folder / name)["sha256"] != entries[name]["sha256"]:
                return f"{name} does not have the sha256 in {MANIFEST}"
        except (OSError, KeyError, TypeError) as error:
            return f"{name} cannot be checked ({type(error).__name__}: {error})"
    return ""
