"""Hardware and package versions of a run.

torch is imported by the functions that need it, since programs that only read flags import this.
"""

import importlib.metadata
import math
import os
import platform
import re
import shutil
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
# Instructions that multiply bf16 numbers, as /proc/cpuinfo spells them: AMX and AVX-512 on x86, and
# the extension of Arm.
BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN, torch's library of matrix products, does not use
# them.
ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def hardware() -> dict[str, str | int | float]:
    """Return accelerator, processor, cores and host memory (GiB) of this machine."""
    import psutil
    import torch

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


def threads_per_rank(ranks: int) -> int:
    """Return how many threads each of `ranks` on this machine should compute with, at least 1.

    They are the physical cores that this process may use, divided among the ranks: two hardware
    threads of a core share its vector units. The CPU limit of a container counts, too.
    """
    import psutil

    threads = psutil.cpu_count() or 1
    threads_per_core = max(1, threads // (psutil.cpu_count(logical=False) or threads))
    cores = min(cpu_cores() // threads_per_core, _cgroup_cores())
    return max(1, math.floor(cores) // max(ranks, 1))


def bf16_unit() -> str:
    """Return the name of this CPU's instructions that multiply bf16 numbers; "" if it has none.

    Without them torch converts every number to fp32 and back, and bf16 is slower than fp32.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISA_WITHOUT_BF16:
        return ""
    flags = (_cpu_info("flags") or _cpu_info("Features")).split()
    return next((name for name in BF16_UNITS if name in flags), "")


def can_compile() -> bool:
    """Return whether torch.compile works on this GPU: it needs Triton and a C compiler."""
    import torch
    from torch.utils import _triton

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    return torch.cuda.is_available() and bool(compiler) and _triton.has_triton()


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
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """Return the value of `key` for the first processor of /proc/cpuinfo; "" if it has none."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cgroup_cores() -> float:
    """Return the cores that the container's CPU limit allows (cgroup v2); infinity without one."""
    try:
        quota, period = CGROUP_LIMIT.read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")
