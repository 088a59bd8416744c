"""DeepSpeed's compiled operators: which a run needs, whether they are built, and their builds.

torch marks a build by a file called lock, which a killed process leaves, and others then wait for
it without end. Here each build also holds a lock of the system, which ends with its process. Who
holds that one may delete torch's.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from dschat.engine.device import on_cpu
from dschat.runtime.log import logger

# Operators that a run compiles when it starts: the communication between ranks on a CPU, and on a
# GPU the host's Adam for --offload. All others are torch's.
CPU_OPS = {"ShareMemCommBuilder": "every run"}
GPU_OPS = {"CPUAdamBuilder": "--offload"}
# A program without our lock makes torch's before it starts the compiler, by which it is found.
YOUNG_LOCK_S = 2.0
POLL_S = 0.1
LOCK_NAME = "dschat.lock"


@dataclass(frozen=True)
class Op:
    """One operator on this machine.

    Attributes:
        name: DeepSpeed's name of it.
        needed_by: the flag that needs it, or "every run".
        folder: the folder in which it is built.
        built: whether it is built, and for the torch that is installed.
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
        built = bool(installed_ops.get(name)) or _is_built(folder / f"{name}.so")
        found.append(Op(name, needed_by, folder, built, stale_lock(folder)))
    return found


def _is_built(file: Path) -> bool:
    """Return whether an operator is built, and for the torch that is installed."""
    try:
        return file.stat().st_mtime >= Path(torch.__file__).stat().st_mtime
    except OSError:
        return False


def build_root() -> Path:
    """Return the folder below which torch compiles extensions."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    # torch knows the part below its default root only together with an extension's name, whose
    # folder it makes.
    return Path(cpp_extension._get_build_directory("dschat", verbose=False)).parent


def stale_lock(folder: Path) -> Path | None:
    """Return torch's lock in a build folder if no process works there, else None."""
    lock = folder / "lock"
    if not lock.exists():
        return None
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in word for word in words):
            return None
    return lock


def load_op(builder_name: str) -> float:
    """Load an operator, and build it first if it is not built yet.

    A lock that a killed build left is deleted. Processes of one host do this one after the other;
    a process that ends or is killed never keeps the others waiting.

    Args:
        builder_name: as DeepSpeed's accelerator knows it, such as "CPUAdamBuilder".

    Returns:
        The seconds of the build; 0 if there was nothing to build.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if installed_ops.get(builder.name):
        builder.load()
        return 0.0
    folder = build_root() / builder.name
    with _build_lock():
        _clear_stale_lock(folder)
        if _is_built(folder / f"{builder.name}.so"):
            builder.load()
            return 0.0
        # As a warning, which every rank shows: any of a host may come first.
        logger.warning(f"compiling DeepSpeed's operator {builder.name}: once, for about a minute")
        started = time.monotonic()
        builder.load()
        return time.monotonic() - started


@contextlib.contextmanager
def _build_lock() -> Iterator[None]:
    lock = filelock.FileLock(build_root() / LOCK_NAME)
    try:
        build_root().mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        logger.info("waiting for another process that compiles DeepSpeed's operators")
        lock.acquire()
    except OSError:
        # Nothing can be built in a folder that is not writable, so nothing is to be locked.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _clear_stale_lock(folder: Path) -> None:
    """Wait until no process builds in `folder`, and delete torch's lock if a killed build left it.

    The compiler may outlive the process that started it, which alone would delete the lock. The
    caller holds our lock.
    """
    lock = folder / "lock"
    began = time.monotonic()
    while lock.exists():
        if time.monotonic() - began >= YOUNG_LOCK_S and stale_lock(folder):
            logger.warning(f"deleting {lock}, which a killed build left")
            lock.unlink(missing_ok=True)
        time.sleep(POLL_S)


def load_ops_of_every_run() -> None:
    """Load, and build if needed, the operators without which no run starts here."""
    if on_cpu():
        for name in CPU_OPS:
            # DeepSpeed does without it on a processor that lacks the instructions.
            if get_accelerator().create_op_builder(name).is_compatible(verbose=False):
                load_op(name)


def build_ops() -> dict[str, float]:
    """Build what is not built yet, after clearing stale locks.

    Returns:
        Seconds by operator, without those that were built before.

    Raises:
        RuntimeError: a build failed, with the compiler's words.
    """
    seconds = {}
    for op, builder_name in zip(needed_ops(), CPU_OPS if on_cpu() else GPU_OPS, strict=True):
        if op.lock is not None or not op.built:
            seconds[op.name] = load_op(builder_name)
    return {name: value for name, value in seconds.items() if value}
