"""Build DeepSpeed's compiled operators, and find locks that a killed build left."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from dschat.engine.device import on_cpu

# Operators that a run compiles when it starts: the communication between ranks on a CPU, and on a
# GPU the host's Adam for --offload. All others are torch's.
CPU_OPS = {"ShareMemCommBuilder": "every run"}
GPU_OPS = {"CPUAdamBuilder": "--offload"}


@dataclass(frozen=True)
class Op:
    """One operator on this machine.

    Attributes:
        name: DeepSpeed's name of it.
        needed_by: the flag that needs it, or "every run".
        folder: the folder in which it is built.
        built: whether it is built.
        lock: a lock that no running build holds, or None.
    """

    name: str
    needed_by: str
    folder: Path
    built: bool
    lock: Path | None


def needed_ops() -> list[Op]:
    """Return the operators that runs on this accelerator use."""
    found = []
    for builder_name, needed_by in (CPU_OPS if on_cpu() else GPU_OPS).items():
        name = get_accelerator().create_op_builder(builder_name).name
        folder = build_root() / name
        built = (folder / f"{name}.so").exists() or bool(installed_ops.get(name))
        found.append(Op(name, needed_by, folder, built, stale_lock(folder)))
    return found


def build_root() -> Path:
    """Return the folder below which torch compiles extensions."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    # torch tells its default root only with the name of an extension, and makes that folder.
    return Path(cpp_extension._get_build_directory("dschat", verbose=False)).parent


def stale_lock(folder: Path) -> Path | None:
    """Return the lock in a build folder if no process works there, else None.

    A run that waits for this lock would never continue.
    """
    lock = folder / "lock"
    if not lock.exists():
        return None
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in word for word in words):
            return None
    return lock


def build_ops() -> dict[str, float]:
    """Clear stale locks, and build the operators that are not built yet.

    Returns:
        The seconds of each build, by the operator's name.

    Raises:
        RuntimeError: a build failed; holds the compiler's messages.
    """
    seconds = {}
    builders = {}
    for builder_name in CPU_OPS if on_cpu() else GPU_OPS:
        builders[get_accelerator().create_op_builder(builder_name).name] = builder_name
    for op in needed_ops():
        if op.lock is not None:
            op.lock.unlink(missing_ok=True)
        if not op.built:
            started = time.monotonic()
            get_accelerator().create_op_builder(builders[op.name]).load()
            seconds[op.name] = time.monotonic() - started
    return seconds
