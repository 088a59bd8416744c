"""Checkpoints of a whole run: folders step_N with the engines, the state of each rank, and facts.

A checkpoint is complete or does not exist. It is written under a temporary name, flushed to disk,
closed by its manifest and only then renamed. The oldest checkpoint is deleted after the newest is
complete. The file `latest` names the newest.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

from dschat.engine.host_memory import HostMemory
from dschat.engine.reshard import load_engine_universally
from dschat.engine.state import copy_engine, load_engine, save_engine, write_files
from dschat.runtime import dist
from dschat.runtime.files import apply_umask, fsync, write_json, write_text
from dschat.runtime.log import logger
from dschat.runtime.manifest import content_fault, file_entry, read_manifest, write_manifest

NAME = re.compile(r"step_(\d{8})")
FACTS = "facts.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file has the size and the checksum that the manifest gives."""

    path: Path
    step: int  # N of step_N: updates that were done; rollouts in step 3
    facts: dict  # JSON that is the same for all ranks; "processes" is the world size

    @property
    def processes(self) -> int:
        """World size of the run that saved it."""
        return self.facts["processes"]

    def load_engines(self, engines: dict[str, Any]) -> None:
        """Load the state of each engine. Every rank must call it.

        Args:
            engines: by the name under which each was saved.

        Raises:
            ValueError: another number of ranks saved it, and it cannot be converted, or its folder
                is not writable.
        """
        scratch = self.path.parent / f".{self.path.name}.universal"
        converts = self.processes != dist.world_size() and any(
            engine.zero_optimization_stage() for engine in engines.values()
        )
        if converts and not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise ValueError(
                f"--resume {self.path}: another number of ranks saved it, it is converted in its "
                f"folder, and {self.path.parent} is not writable. Copy it to a folder that is."
            )
        for name, engine in engines.items():
            # Without ZeRO, every rank has the whole state.
            if self.processes == dist.world_size() or engine.zero_optimization_stage() == 0:
                load_engine(engine, self.path, name)
            else:
                load_engine_universally(engine, self.path, name, scratch=scratch)
        if dist.is_main():
            shutil.rmtree(scratch, ignore_errors=True)

    def rank_state(self, rank: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the tensors and the JSON that `rank` (default: this one) saved."""
        rank = dist.rank() if rank is None else rank
        with safe_open(self.path / _rank_file(rank), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, json.loads(file.metadata()["state"])


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` updates or rollouts."""
    return root / f"step_{step:08d}"


def save_checkpoint(
    root: Path,
    step: int,
    *,
    engines: dict[str, object],
    facts: dict,
    tensors: dict[str, torch.Tensor],
    state: dict,
    keep: int,
) -> bool:
    """Write root/step_N. Every rank must call it.

    Args:
        root: the folder of all checkpoints of the run.
        step: N: the updates that are done, or the rollouts in step 3.
        engines: DeepSpeed engines to save, by name.
        facts: JSON, the same for all ranks.
        tensors: state of this rank.
        state: further state of this rank, as JSON.
        keep: number of checkpoints to keep, this one included; older ones are deleted. 0: keep all.

    Returns:
        True if the checkpoint was written. False if that failed, for example because the disk is
        full: a warning is logged, and earlier checkpoints are untouched.
    """
    entries, fault = _take_engines(root, step, engines, save_engine)
    contents = _RankContents(facts, tensors, state, entries)
    return _complete(root, step, contents, keep=keep, fault=fault)


def copy_checkpoint(
    root: Path,
    step: int,
    *,
    engines: dict[str, object],
    facts: dict,
    tensors: dict[str, torch.Tensor],
    state: dict,
    keep: int,
    memory: HostMemory,
    group: ProcessGroup | None,
) -> Callable[[], bool]:
    """Copy the state to host memory, to be written while training continues.

    Every rank must call it, and what it returns.

    Args:
        root: as all others that are not named here, see ``save_checkpoint``.
        step: N.
        engines: by name.
        facts: JSON.
        tensors: state of this rank.
        state: further state.
        keep: number of checkpoints.
        memory: holds the copy until it is written.
        group: for the messages of what is returned; see ``dist.new_cpu_group``.

    Returns:
        A function that writes the checkpoint, in any thread, and returns what ``save_checkpoint``
        returns.
    """
    memory.begin()
    files, fault = _take_engines(root, step, engines, partial(copy_engine, memory=memory))
    facts, tensors, state = memory.copy((facts, tensors, state))

    def write() -> bool:
        entries, failure = write_files(files) if not fault else ({}, fault)
        failure = dist.first_fault(failure, group)
        contents = _RankContents(facts, tensors, state, entries)
        return _complete(root, step, contents, keep=keep, fault=failure, group=group)

    return write


def _take_engines(
    root: Path, step: int, engines: dict[str, object], take: Callable[..., tuple[dict, str]]
) -> tuple[dict[Path, Any], str]:
    """Make the folder of a new checkpoint, and take the engines' files.

    Args:
        root: the folder of all checkpoints of the run.
        step: N.
        engines: by name.
        take: ``save_engine`` or ``copy_engine``.

    Returns:
        What `take` returns of the files of this rank, and the fault, the same on all ranks, or "".
    """
    temporary = _temporary(root, step)
    fault = dist.first_fault(_failure(_make_empty, temporary) if dist.is_main() else "")
    files: dict[Path, Any] = {}
    for name, engine in engines.items() if not fault else ():
        taken, fault = take(engine, temporary, name)
        files |= taken
        fault = dist.first_fault(fault)
        if fault:
            break
    return files, fault


@dataclass(frozen=True)
class _RankContents:
    """What a rank adds to a checkpoint."""

    facts: dict
    tensors: dict[str, torch.Tensor]
    state: dict
    entries: dict[Path, dict]  # of the engines' files, which are written already


def _complete(
    root: Path,
    step: int,
    contents: _RankContents,
    *,
    keep: int,
    fault: str,
    group: ProcessGroup | None = None,
) -> bool:
    """Write the rest of a checkpoint after its engines; see ``save_checkpoint``.

    Args:
        root: the folder of all checkpoints of the run.
        step: N.
        contents: of this rank.
        keep: number of checkpoints to keep.
        fault: the same on all ranks; "" if the engines are written.
        group: for the messages between ranks.
    """
    path = checkpoint_folder(root, step)
    temporary = _temporary(root, step)
    entries = {
        file.relative_to(temporary).as_posix(): entry for file, entry in contents.entries.items()
    }
    if not fault:
        failure = _failure(_write_rank_files, temporary, contents, entries)
        fault = dist.first_fault(failure, group)
    gathered = dist.gather_texts(json.dumps(entries), group)
    if not fault and dist.is_main():
        all_entries: dict[str, dict] = {}
        for text in gathered:
            all_entries |= json.loads(text)
        fault = _failure(_finish, temporary, path, all_entries)
    fault = dist.first_fault(fault, group)
    if fault:
        # On every rank: if hosts share no folder, each has its own part.
        shutil.rmtree(temporary, ignore_errors=True)
    if fault and dist.is_main():
        logger.warning(
            f"Could not save checkpoint {path.name}: {fault}. "
            "Earlier checkpoints are untouched; the run continues."
        )
    elif keep and dist.is_main():
        _delete_older(root, step, keep=keep)
    dist.barrier(group)
    return not fault


def _delete_older(root: Path, step: int, *, keep: int) -> None:
    """Delete all checkpoints up to `step` but the newest `keep`."""
    # Newer folders are damaged checkpoints that this run did not resume from. They do not
    # count, or they would push out the checkpoints of this run.
    for old in [folder for folder in _folders(root) if _step(folder) <= step][:-keep]:
        problem = _failure(_delete, old)
        if problem:
            logger.warning(f"Could not delete {old}: {problem}")


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint in `root`; None if there is none. Every rank must call it.

    Logs a warning for each newer checkpoint that is damaged.
    """
    own_names = json.dumps([path.name for path in _folders(root)])
    names = json.loads(dist.gather_texts(own_names)[0])  # rank 0's, so that all ranks agree
    for name in reversed(names):
        try:
            return open_checkpoint(root / name)
        except ValueError as error:
            if dist.is_main():
                logger.warning(f"{error} Trying the one before it.")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder `path`, after comparing each file with the manifest.

    Every rank must call it: ranks share the work.

    Raises:
        ValueError: it is not whole; on every rank.
    """
    facts: dict = {}
    fault = ""
    try:
        name = NAME.fullmatch(path.name)
        if not name:
            raise ValueError("the folder of a checkpoint is named step_ and eight digits")
        entries = read_manifest(path)
        fault = content_fault(path, entries, sorted(entries)[dist.rank() :: dist.world_size()])
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if facts["step"] != int(name[1]):
            raise ValueError(f"{FACTS} belongs to another checkpoint, of step {facts['step']}")
        if type(facts["processes"]) is not int:
            raise ValueError(f"{FACTS} does not give the number of processes")
    except KeyError as error:
        fault = fault or f"{FACTS} lacks {error}"
    except (OSError, ValueError, TypeError) as error:
        fault = fault or str(error)
    fault = dist.first_fault(fault)
    if fault:
        raise ValueError(f"{path} is not a whole checkpoint: {fault}.")
    return Checkpoint(path, facts["step"], facts)


def delete_newer(root: Path, step: int) -> None:
    """Delete unfinished checkpoints in `root`, and those after `step`, from which a run resumes."""
    if not dist.is_main() or not root.is_dir():
        return
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _folders(root):
        if _step(path) > step:
            _delete(path)


def is_shared(folder: Path) -> bool:
    """Return whether the existing `folder` is the same on all ranks. Every rank must call it."""
    mark = folder / dist.gather_texts(f".shared.{uuid.uuid4().hex}")[0]
    fault = dist.first_fault(_failure(mark.touch) if dist.is_main() else "")
    hidden = dist.first_fault("" if fault or mark.exists() else "not there")
    if dist.is_main():
        mark.unlink(missing_ok=True)
    return not (fault or hidden)


def last_step(root: Path) -> int | None:
    """Return N of the newest folder step_N in `root`, whole or not; None if there is none.

    Every rank must call it; all get what rank 0 sees.
    """
    folders = _folders(root)
    found = dist.gather_texts(str(_step(folders[-1])) if folders else "")[0]
    return int(found) if found else None


def _folders(root: Path) -> list[Path]:
    """Return the checkpoints in `root`, the oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.glob("step_*") if NAME.fullmatch(path.name))


def _step(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _temporary(root: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written before it is renamed."""
    return root / f".{checkpoint_folder(root, step).name}.tmp"


def _make_empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_rank_files(temporary: Path, contents: _RankContents, entries: dict[str, dict]) -> None:
    """Write the state of this rank, and on rank 0 the facts; add the files to `entries`."""
    names = [_rank_file(dist.rank())]
    tensors = {
        key: tensor.detach().cpu().contiguous().clone() for key, tensor in contents.tensors.items()
    }
    save_file(tensors, temporary / names[0], metadata={"state": json.dumps(contents.state)})
    apply_umask(temporary / names[0])
    fsync(temporary / names[0])
    if dist.is_main():
        write_json(temporary / FACTS, contents.facts)
        names.append(FACTS)
    entries.update({name: file_entry(temporary / name) for name in names})


def _finish(temporary: Path, path: Path, entries: dict[str, dict]) -> None:
    """Write the manifest and rename the folder to its final name."""
    write_manifest(temporary, entries)
    try:
        read_manifest(temporary)
    except ValueError as error:
        raise OSError(
            f"{error}. All ranks must see the same folder {path.parent}: is it shared by all hosts?"
        ) from error
    _delete(path)
    temporary.rename(path)
    fsync(path.parent)
    write_text(path.parent / LATEST, path.name + "\n")
    fsync(path.parent)


def _delete(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no half of it passes for a whole one."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _failure(action, *args) -> str:
    """Call `action` and return its error as text; "" if it succeeded."""
    try:
        action(*args)
    except Exception as error:
        # Any exception, since safetensors has its own, and the other ranks wait for this result.
        return f"{type(error).__name__}: {error}"
    return ""
