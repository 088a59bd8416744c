"""The state of one DeepSpeed engine in a folder, for every ZeRO stage.

The state is weights, optimizer, schedule and loss scale.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from dschat.engine.host_memory import HostMemory
from dschat.runtime.manifest import HashingFile


class _Writer(TorchCheckpointEngine):
    """Writes files to disk and records their checksums.

    A failure is recorded, not raised, so that no rank leaves the others waiting.
    """

    def __init__(self):
        super().__init__()
        self.entries: dict[Path, dict] = {}
        self.fault = ""

    def makedirs(self, path, exist_ok=False):
        with self.kept(path):
            Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict, path: str):
        with self.kept(path):
            with HashingFile(path) as file:
                torch.save(state_dict, file)
            self.entries[Path(path)] = file.entry

    @contextlib.contextmanager
    def kept(self, path):
        """Keep an error of writing `path` as the fault."""
        try:
            yield
        # torch turns a failed write into a RuntimeError.
        except (OSError, RuntimeError, MemoryError) as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.fault = self.fault or f"{Path(path).name}: {cause}"


class _Copier(_Writer):
    """Copies what would be written to host memory."""

    def __init__(self, memory: HostMemory):
        super().__init__()
        self.files: dict[Path, Any] = {}
        self._memory = memory

    def save(self, state_dict, path: str):
        with self.kept(path):
            self.files[Path(path)] = self._memory.copy(state_dict)


def save_engine(engine, folder: Path, name: str) -> tuple[dict[Path, dict], str]:
    """Write the engine's state to `folder`/`name`. All ranks must call it.

    Returns:
        The manifest entries of the files that this rank wrote, and the fault of this
        rank, or "".
    """
    writer = _Writer()
    _save_by(writer, engine, folder, name)
    return writer.entries, writer.fault


def copy_engine(engine, folder: Path, name: str, memory: HostMemory) -> tuple[dict[Path, Any], str]:
    """Copy the engine's state to host memory, and make its folder. All ranks must call it.

    Returns:
        The contents of the files that ``write_files`` has to write, and the fault of this rank, or
        "".
    """
    copier = _Copier(memory)
    _save_by(copier, engine, folder, name)
    return copier.files, copier.fault


def write_files(files: dict[Path, Any]) -> tuple[dict[Path, dict], str]:
    """Write what ``copy_engine`` returned; return the same as ``save_engine``."""
    writer = _Writer()
    for path, state in files.items():
        writer.save(state, str(path))
    return writer.entries, writer.fault


def _save_by(writer: _Writer, engine, folder: Path, name: str) -> None:
    """Let `writer` save the engine's state to `folder`/`name`."""
    usual = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # It copies a program for the user into a folder that holds no other, and a full disk would
    # stop rank 0 alone here.
    engine._copy_recovery_script = lambda path: None
    try:
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


def load_engine(engine, folder: Path, name: str) -> None:
    """Load the state that the same number of ranks saved.

    `engine` is freshly built, of the same model and configuration. DeepSpeed reads these files by
    pickle, which can run any code: they must have been compared with their manifest, and the folder
    must be one that the user named or that this run wrote.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=name)
    assert path is not None, f"{folder}/{name} holds no engine"
