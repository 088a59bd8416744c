"""Check whether this machine can run dschat, and print one line per finding with what to do.

python -m dschat.doctor
python -m dschat.doctor --build_ops  # also compile DeepSpeed's ops and clear stale locks
"""

# Only the standard library is imported at the top, and an old Python must be able to read this
# file: it is what reports a missing package or an old Python.
from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import socket
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
SMALLEST_SHM_GIB = 1.0
SMALLEST_DISK_GIB = 20.0
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, and what to do if it is not good."""

    text: str
    remedy: str = ""
    stops: bool = False  # nothing runs until this is fixed

    def __str__(self) -> str:
        """Return the line."""
        if not self.remedy:
            return f"good  {self.text}"
        word = "BAD " if self.stops else "note"
        return f"{word}  {self.text}: {self.remedy}"


def main(argv: list[str] | None = None) -> None:
    """Print the findings; exit with status 1 if one of them stops every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build_ops", action="store_true", help="compile ops that are not compiled yet"
    )
    args = parser.parse_args(argv)
    findings = check_versions()
    if not any(finding.stops for finding in findings):
        findings += [*check_accelerator(), *check_compiler()]
        if args.build_ops and not any(finding.stops for finding in findings):
            findings += build_all()
        findings += [*check_ops(), *check_room(), check_hub()]
    print("\n".join(str(finding) for finding in findings))
    if any(finding.stops for finding in findings):
        sys.exit("Fix what is BAD above first.")


def build_all() -> list[Finding]:
    """Compile the operators that are not compiled yet; report each, or why one failed."""
    from dschat.engine.compiled_ops import build_ops

    try:
        return [
            Finding(f"built {name} in {seconds:.0f} s") for name, seconds in build_ops().items()
        ]
    except Exception as error:  # compiler, ninja, torch and DeepSpeed raise many types
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        return [
            Finding(
                f"an operator does not compile: {reason}",
                "see the compiler's output above; CXX selects the compiler",
                stops=True,
            )
        ]


def check_versions() -> list[Finding]:
    """Check Python and each package of requirements.txt against the allowed versions."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # an empty environment
        return [
            Finding(
                "packages: not even packaging is installed",
                "pip install -r requirements.txt",
                stops=True,
            )
        ]
    python = sys.version.split()[0]
    old = sys.version_info < (3, 10)
    findings = [Finding(f"Python {python}", "install 3.10 or later" if old else "", stops=old)]
    path = ROOT / "requirements.txt"
    lines = (
        path.read_text(encoding="utf-8").splitlines()
        if path.exists()
        else importlib.metadata.requires("dschat")
    )
    for line in lines:
        if line.strip() and not line.startswith("#") and "extra ==" not in line:
            findings.append(_check_package(Requirement(line)))
    return findings


def _check_package(wanted) -> Finding:
    if wanted.marker is not None and not wanted.marker.evaluate():
        return Finding(f"{wanted.name} is not needed here")
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(f"{wanted.name} is not installed", f"pip install '{wanted}'", stops=True)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(
            f"{wanted.name} {version}", f"tested with {wanted.specifier}: pip install '{wanted}'"
        )
    return Finding(f"{wanted.name} {version}")


def check_accelerator() -> list[Finding]:
    """Report the GPUs, or the processor if there is no GPU."""
    import psutil
    import torch

    from dschat.runtime.hardware import cpu_cores

    host = f"{cpu_cores()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB of host memory"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        shown = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
        return [Finding(f"{len(cards)} GPU(s): {shown}; {host}")]
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = "torch is a CPU build; install the CUDA build from pytorch.org"
        return [Finding("a GPU that torch cannot use", remedy)]
    if torch.version.cuda is not None:
        remedy = "if there should be one, check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return [Finding(f"no GPU; {host}", remedy)]
    return [Finding(f"no GPU, torch for the CPU; {host}")]


def check_compiler() -> list[Finding]:
    """Check the tools with which DeepSpeed compiles its operators."""
    import torch

    compiler = os.environ.get("CXX", "").strip() or "c++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    # On a GPU, only --offload needs a compiler.
    stops = not torch.cuda.is_available()
    wanted = [
        (
            f"C++ compiler {compiler}",
            shutil.which(compiler.split()[0]),
            "install one (Debian, Ubuntu: build-essential)",
        ),
        (
            "ninja",
            shutil.which("ninja"),
            "pip install ninja, or put the environment's bin folder on PATH",
        ),
        (
            "Python's headers",
            header.exists(),
            f"no {header}: install them (Debian, Ubuntu: python3-dev)",
        ),
    ]
    if torch.cuda.is_available():
        nvcc = (
            shutil.which("nvcc")
            or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
        )
        wanted.append(
            ("nvcc", nvcc, "--offload compiles with the CUDA toolkit: install it, or set CUDA_HOME")
        )
    return [
        Finding(name, "" if there else remedy, stops=stops and not there)
        for name, there, remedy in wanted
    ]


def check_ops() -> list[Finding]:
    """Check which of DeepSpeed's operators are built, and whether killed builds left locks."""
    from dschat.engine.compiled_ops import needed_ops

    findings = []
    for op in needed_ops():
        text = f"operator {op.name} (for {op.needed_by})"
        if op.lock is not None:
            remedy = (
                f"a killed build left {op.lock}; the next run deletes it, or --build_ops now. "
                "Programs other than dschat's would wait for it indefinitely"
            )
            findings.append(Finding(text, remedy))
        elif op.built:
            findings.append(Finding(f"{text}: built in {op.folder}"))
        else:
            findings.append(
                Finding(
                    text,
                    "not built yet for this torch; the first run builds it, or --build_ops now (a "
                    "minute or two)",
                )
            )
    return findings


def check_room() -> list[Finding]:
    """Check disk space for models and data, and shared memory for communication between ranks."""
    from dschat.runtime.paths import cache_dir

    findings = []
    for name, path in {"cache": cache_dir(), "working": Path.cwd()}.items():
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free / GIB
        remedy = ""
        if free < SMALLEST_DISK_GIB:
            remedy = "too little for large models; DSCHAT_CACHE moves the cache"
        if not os.access(there, os.W_OK):
            remedy = "not writable"
        findings.append(Finding(f"{name} folder {path}: {free:.0f} GiB free", remedy))
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total / GIB
        remedy = ""
        if size < SMALLEST_SHM_GIB:
            remedy = "too small for several ranks; start a container with --shm-size=8g"
        findings.append(Finding(f"/dev/shm of {size:.1f} GiB", remedy))
    return findings


def check_hub() -> Finding:
    """Check whether the model hub can be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub: turned off by HF_HUB_OFFLINE; models and data come from folders and the cache"
        )
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        remedy = f"give models and data as folders, or set HF_ENDPOINT to a mirror ({error})"
        return Finding(f"hub {url.hostname} cannot be reached", remedy)
    return Finding(f"hub {url.hostname} can be reached")


if __name__ == "__main__":
    main()
