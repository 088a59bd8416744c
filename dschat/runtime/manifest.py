"""Files that are on disk when they are said to be, and a folder's manifest: the size and sha256 of each file in it.

The manifest is written last, so that a folder without one was never finished; whatever differs from it is damaged.
"""

import hashlib
import json
import os
from pathlib import Path

from dschat.runtime.files import fsync, write_json

MANIFEST = "manifest.json"
CHUNK = 2**24


class HashingFile:
    """A file to write from beginning to end, which is on disk, with its size and sha256 known, once it is closed."""

    def __init__(self, path: str | Path):
        self._file = open(path, "wb")
        self._sum, self.size = hashlib.sha256(), 0

    def write(self, data) -> int:
        self._sum.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def entry(self) -> dict:
        """The file's entry in a manifest."""
        return {"size": self.size, "sha256": self._sum.hexdigest()}


def file_entry(path: Path) -> dict:
    """The manifest entry of a file as it lies on disk."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        size = 0
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    """Write `folder`'s manifest of `entries`, by name relative to it, and have folder and manifest on disk."""
    write_json(folder / MANIFEST, {"files": entries})
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(inner)


def read_manifest(folder: Path) -> dict[str, dict]:
    """The entries of the manifest of `folder`, which are those of the files that are there, all of the right size.

    Raises:
        ValueError: no manifest, or other files than it says; the message says which.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["size"] for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MANIFEST} is not there or not readable ({type(error).__name__})"
        ) from error
    # Only names that are found here are ever opened, whatever the manifest says.
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(folder)} is no plain file")
        if path.is_file() and path != folder / MANIFEST:
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    for name in sorted(set(sizes) | set(found)):
        if name not in found or name not in sizes:
            raise ValueError(
                f"{name} is {'missing' if name not in found else 'not in ' + MANIFEST}"
            )
        if found[name] != sizes[name]:
            raise ValueError(f"{name} has {found[name]} bytes, not {sizes[name]}")
    return entries


def content_fault(folder: Path, entries: dict[str, dict], names: list[str]) -> str:
    """What is wrong with the content of the files `names` of `folder`; "" where nothing is."""
    for name in names:
        try:
            if file_entry(folder / name)["sha256"] != entries[name]["sha256"]:
                return f"{name} does not have the sha256 that {MANIFEST} says"
        except (OSError, KeyError, TypeError) as error:
            return f"{name} cannot be checked ({type(error).__name__}: {error})"
    return ""
