"""Checkpoints of a whole run: folders step_N that hold engines, each process's own state and facts, or do not exist.

A checkpoint is written under another name, brought to disk, closed by its manifest and only then renamed; the oldest
goes when the newest is whole. `latest` names the newest.
"""

import json
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dschat.engine.reshard import load_engine_universally
from dschat.engine.state import load_engine, save_engine
from dschat.runtime import dist
from dschat.runtime.files import fsync, write_json, write_text
from dschat.runtime.log import logger
from dschat.runtime.manifest import content_fault, file_entry, read_manifest, write_manifest

NAME = re.compile(r"step_(\d{8})")
FACTS = "facts.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file is there, with the size and sum that its manifest says."""

    path: Path
    step: int
    facts: dict  # what is the same for all processes; "processes" is how many there were

    @property
    def processes(self) -> int:
        return self.facts["processes"]

    def load_engines(self, engines: dict[str, Any]) -> None:
        """Take the state of each engine, by the name it was saved under. Every process must call it.

        Raises:
            ValueError: another number of processes saved it, and it cannot be converted.
        """
        scratch = self.path.parent / f".{self.path.name}.universal"
        for name, engine in engines.items():
            # Without ZeRO every process has all.
            if self.processes == dist.world_size() or engine.zero_optimization_stage() == 0:
                load_engine(engine, self.path, name)
            else:
                load_engine_universally(engine, self.path, name, scratch=scratch)
        if dist.is_main():
            shutil.rmtree(scratch, ignore_errors=True)

    def rank_state(self, rank: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors and the JSON that the process `rank` (default: this one) gave to ``save_checkpoint``."""
        with safe_open(
            self.path / _rank_file(dist.rank() if rank is None else rank), framework="pt"
        ) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(
                file.metadata()["state"]
            )


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
    """Write root/step_N. Every process must call it.

    Args:
        facts: JSON, the same for all processes.
        tensors, state: what this process alone has, the latter as JSON.
        keep: delete older checkpoints but for so many in all; 0: keep all.

    Returns:
        Whether it was written. It was not where the disk is full or the like; a warning then says so, and the
        checkpoints from before are as they were.
    """
    path = root / f"step_{step:08d}"
    temporary = root / f".{path.name}.tmp"
    fault = dist.first_fault(_tried(_emptied, temporary) if dist.is_main() else "")
    entries: dict[str, dict] = {}
    for name, engine in engines.items() if not fault else ():
        written, fault = save_engine(engine, temporary, name)
        entries |= {
            file.relative_to(temporary).as_posix(): entry for file, entry in written.items()
        }
        fault = dist.first_fault(fault)
        if fault:
            break
    if not fault:
        fault = dist.first_fault(_tried(_write_own, temporary, facts, tensors, state, entries))
    gathered = dist.gather_texts(json.dumps(entries))
    if not fault and dist.is_main():
        fault = _tried(
            _finish,
            temporary,
            path,
            {k: v for text in gathered for k, v in json.loads(text).items()},
        )
    fault = dist.first_fault(fault)
    if fault:
        # By everyone: where hosts share no folder, each has its own half.
        shutil.rmtree(temporary, ignore_errors=True)
    if fault and dist.is_main():
        logger.warning(
            f"no checkpoint of step {step}: {fault}. Earlier checkpoints are untouched; the run continues."
        )
    elif keep and dist.is_main():
        # Newer folders are damaged ones, which this run started without; they are no reason to delete what it saves.
        for old in [folder for folder in _folders(root) if _step(folder) <= step][:-keep]:
            if problem := _tried(_delete, old):
                logger.warning(f"{old} could not be deleted: {problem}")
    dist.barrier()
    return not fault


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `root`, with a warning for each newer one that is not; None where there is none.

    Every process must call it.
    """
    for name in json.loads(
        dist.gather_texts(json.dumps([path.name for path in _folders(root)]))[0]
    )[::-1]:
        try:
            return open_checkpoint(root / name)
        except ValueError as error:
            if dist.is_main():
                logger.warning(f"{error} Trying the one before.")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, after each of its files was compared with the manifest.

    Every process must call it: they share the work.

    Raises:
        ValueError: it is not whole; on every process.
    """
    entries, facts, fault = {}, {}, ""
    try:
        if not (name := NAME.fullmatch(path.name)):
            raise ValueError("a checkpoint's folder is called step_ and eight digits")
        entries = read_manifest(path)
        fault = content_fault(path, entries, sorted(entries)[dist.rank() :: dist.world_size()])
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if facts["step"] != int(name[1]):
            raise ValueError(f"{FACTS} is of step {facts['step']}")
        if type(facts["processes"]) is not int:
            raise ValueError(f"{FACTS} has no number of processes")
    except KeyError as error:
        fault = fault or f"{FACTS} lacks {error}"
    except (OSError, ValueError, TypeError) as error:
        fault = fault or str(error)
    fault = dist.first_fault(fault)
    if fault:
        raise ValueError(f"{path} is no whole checkpoint: {fault}.")
    return Checkpoint(path, facts["step"], facts)


def delete_newer(root: Path, step: int) -> None:
    """Delete the checkpoints in `root` after `step` and the unfinished ones: a run resumes from there."""
    if not dist.is_main() or not root.is_dir():
        return
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _folders(root):
        if _step(path) > step:
            _delete(path)


def is_shared(folder: Path) -> bool:
    """Return whether the existing `folder` is the same one on all ranks. Every rank must call it."""
    mark = folder / dist.gather_texts(f".shared.{uuid.uuid4().hex}")[0]
    fault = dist.first_fault(_tried(mark.touch) if dist.is_main() else "")
    hidden = dist.first_fault("" if fault or mark.exists() else "not there")
    if dist.is_main():
        mark.unlink(missing_ok=True)
    return not (fault or hidden)


def last_step(root: Path) -> int | None:
    """The step of the newest folder in `root`, whole or not; None where there is none. Every process must call it: what
    the first one sees counts.
    """
    folders = _folders(root)
    found = dist.gather_texts(str(_step(folders[-1])) if folders else "")[0]
    return int(found) if found else None


def _folders(root: Path) -> list[Path]:
    """The checkpoints in `root`, the oldest first."""
    return (
        sorted(path for path in root.glob("step_*") if NAME.fullmatch(path.name))
        if root.is_dir()
        else []
    )


def _step(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _emptied(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_own(
    temporary: Path, facts: dict, tensors: dict, state: dict, entries: dict[str, dict]
) -> None:
    names = [_rank_file(dist.rank())]
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, temporary / names[0], metadata={"state": json.dumps(state)})
    fsync(temporary / names[0])
    if dist.is_main():
        write_json(temporary / FACTS, facts)
        names.append(FACTS)
    entries.update({name: file_entry(temporary / name) for name in names})


def _finish(temporary: Path, path: Path, entries: dict[str, dict]) -> None:
    write_manifest(temporary, entries)
    try:
        read_manifest(temporary)
    except ValueError as error:
        raise OSError(
            f"{error}. All processes must see the same folder {path.parent}: is it shared by all hosts?"
        ) from error
    _delete(path)
    temporary.rename(path)
    fsync(path.parent)
    write_text(path.parent / LATEST, path.name + "\n")
    fsync(path.parent)


def _delete(path: Path) -> None:
    """Delete a checkpoint such that no half of it is ever taken for one."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _tried(action, *args) -> str:
    """Do it, and return what went wrong, or ""."""
    try:
        action(*args)
    except (
        Exception
    ) as error:  # safetensors raises errors of its own; the others wait for this process's word
        return f"{type(error).__name__}: {error}"
    return ""
