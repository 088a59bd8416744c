"""Looks at this machine and says, line by line, what is good and what to do:

python -m dschat.doctor
python -m dschat.doctor --build_ops      # also compile DeepSpeed's operators now, and clear locks of killed builds
"""

# Only the standard library at the top, and nothing that an old Python cannot read: that is for this program to say.
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
    """One line: what was looked at, and what to do about it where it is not good."""

    text: str
    remedy: str = ""
    stops: bool = False  # without the remedy nothing runs

    def __str__(self) -> str:
        word = "good" if not self.remedy else "BAD " if self.stops else "note"
        return f"{word}  {self.text}" + (f": {self.remedy}" if self.remedy else "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build_ops", action="store_true", help="compile what is not compiled yet")
    args = parser.parse_args(argv)
    findings = check_versions()
    if not any(finding.stops for finding in findings):
        findings += [*check_accelerator(), *check_compiler()]
        if args.build_ops and not any(finding.stops for finding in findings):
            findings += build_all()
        findings += [*check_ops(), *check_room(), check_hub()]
    print("\n".join(str(finding) for finding in findings))
    if any(finding.stops for finding in findings):
        sys.exit("what is BAD above has to be mended first")


def build_all() -> list[Finding]:
    """Compile what is not compiled yet; each operator that was, or why one could not be."""
    from dschat.engine.compiled_ops import build_ops

    try:
        return [
            Finding(f"built {name} in {seconds:.0f} s") for name, seconds in build_ops().items()
        ]
    except Exception as error:  # of the compiler, ninja, torch or DeepSpeed, whatever they raise
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        return [
            Finding(
                f"an operator does not compile: {reason}",
                "see the compiler's words above; CXX chooses it",
                stops=True,
            )
        ]


def check_versions() -> list[Finding]:
    """Python and each package of requirements.txt, against the versions it allows."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # an environment without anything in it
        return [
            Finding(
                "packages: not even packaging is there",
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
    """The GPUs, or the processor where there are none."""
    import psutil
    import torch

    from dschat.runtime.hardware import cpu_cores

    host = f"{cpu_cores()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB of host memory"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        shown = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
        return [Finding(f"{len(cards)} GPU(s): {shown}; {host}")]
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = "this torch is built for the CPU; install the build for CUDA from pytorch.org"
        return [Finding("a GPU that torch cannot use", remedy)]
    if torch.version.cuda is not None:
        remedy = "if there should be one, see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
        return [Finding(f"no GPU; {host}", remedy)]
    return [Finding(f"no GPU, torch for the CPU; {host}")]


def check_compiler() -> list[Finding]:
    """What DeepSpeed compiles its operators with."""
    import torch

    compiler = os.environ.get("CXX", "").strip() or "c++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    # On a GPU only --offload compiles.
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
    """DeepSpeed's operators: built, or still to build; locks of killed builds."""
    from dschat.engine.compiled_ops import needed_ops

    findings = []
    for op in needed_ops():
        text = f"operator {op.name} (for {op.needed_by})"
        if op.lock is not None:
            remedy = f"a killed build left {op.lock}, and runs would wait for it for ever: --build_ops clears it"
            findings.append(Finding(text, remedy, stops=True))
        elif op.built:
            findings.append(Finding(f"{text}: built in {op.folder}"))
        else:
            findings.append(
                Finding(
                    text,
                    "not built yet; the first run does it, or --build_ops now (a minute or two)",
                )
            )
    return findings


def check_room() -> list[Finding]:
    """Free space for models and data, and shared memory for the talk between processes."""
    from dschat.runtime.paths import cache_dir

    findings = []
    for name, path in {"cache": cache_dir(), "working": Path.cwd()}.items():
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free / GIB
        remedy = (
            ""
            if free >= SMALLEST_DISK_GIB
            else "little for large models; DSCHAT_CACHE moves the cache"
        )
        if not os.access(there, os.W_OK):
            remedy = "not writable"
        findings.append(Finding(f"{name} folder {path}: {free:.0f} GiB free", remedy))
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total / GIB
        small = size < SMALLEST_SHM_GIB
        remedy = (
            "too small for several processes; in a container, start it with --shm-size=8g"
            if small
            else ""
        )
        findings.append(Finding(f"/dev/shm of {size:.1f} GiB", remedy))
    return findings


def check_hub() -> Finding:
    """Whether the model hub can be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub: off by HF_HUB_OFFLINE; models and data come from folders and the cache"
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
