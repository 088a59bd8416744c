"""DeepSpeed's compiled operators: which a run needs, whether they are built, and locks that a killed build left."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from dschat.engine.device import on_cpu

# What may be compiled at a start: communication between processes on a CPU, and the host's Adam of --offload on a GPU.
# Everything else that runs here is torch's own.
CPU_OPS = {"ShareMemCommBuilder": "every run"}
GPU_OPS = {"CPUAdamBuilder": "--offload"}


@dataclass(frozen=True)
class Op:
    """One operator on this machine."""

    name: str
    needed_by: str
    folder: Path  # of its build
    built: bool
    lock: Path | None  # a lock that no running build holds


def needed_ops() -> list[Op]:
    """The operators that runs on this accelerator use."""
    found = []
    for builder_name, needed_by in (CPU_OPS if on_cpu() else GPU_OPS).items():
        name = get_accelerator().create_op_builder(builder_name).name
        folder = build_root() / name
        built = (folder / f"{name}.so").exists() or bool(installed_ops.get(name))
        found.append(Op(name, needed_by, folder, built, stale_lock(folder)))
    return found


def build_root() -> Path:
    """The folder below which torch compiles extensions."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    # torch knows the part below its default root only together with an extension's name, whose folder it makes.
    return Path(cpp_extension._get_build_directory("dschat", verbose=False)).parent


def stale_lock(folder: Path) -> Path | None:
    """The lock in a build folder, where no process works there: what waits for it would wait without end."""
    lock = folder / "lock"
    if not lock.exists():
        return None
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in word for word in words):
            return None
    return lock


def build_ops() -> dict[str, float]:
    """Build what is not built yet, stale locks cleared first; seconds by operator.

    Raises:
        RuntimeError: a build failed, with the compiler's words.
    """
    seconds = {}
    builders = {
        get_accelerator().create_op_builder(name).name: name
        for name in (CPU_OPS if on_cpu() else GPU_OPS)
    }
    for op in needed_ops():
        if op.lock is not None:
            op.lock.unlink(missing_ok=True)
        if not op.built:
            started = time.monotonic()
            get_accelerator().create_op_builder(builders[op.name]).load()
            seconds[op.name] = time.monotonic() - started
    return seconds
