"""Hardware and package versions of a run."""

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

import torch
from torch.utils._triton import has_triton


def hardware() -> dict[str, str | int | float]:
    """Return accelerator, processor, cores and host memory (GiB) of this machine."""
    import psutil

    found: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cpu_cores": cpu_cores(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpus"] = torch.cuda.device_count()
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return found


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_compile() -> bool:
    """Return whether torch.compile works on this GPU: it needs Triton and a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    return torch.cuda.is_available() and bool(compiler) and has_triton()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    names = ("dschat", "torch", "deepspeed", "transformers", "datasets", "peft", "accelerate")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def op_build_name() -> str:
    """Return a file name made of the versions and the folder of compiled DeepSpeed ops."""
    found = versions()
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", "")
    return re.sub(
        r"[^A-Za-z0-9.]+", "_", f"{found['torch']}-{found['deepspeed']}-{found['python']}-{folder}"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
