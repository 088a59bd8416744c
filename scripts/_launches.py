"""Launches of the steps, for the scripts that reproduce results, and records of their flags."""

import hashlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from dschat.runtime.manifest import file_entry
from dschat.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


def has_gpu() -> bool:
    """Return whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def run_step(main: Path, flags: list[str], *, log: Path) -> float:
    """Launch the main of a step with one rank and return the seconds that it took.

    The log is deleted if the step succeeds.

    Args:
        main: the main.py of the step.
        flags: its flags.
        log: file for its output.

    Raises:
        RuntimeError: the step failed; the message names the log.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += ["--num_gpus" if has_gpu() else "--num_accelerators", "1", str(main), *flags]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{log.stem} failed; see {log}")
    log.unlink()
    return time.monotonic() - started


def flags_shown(flags: list[str]) -> str:
    """Return the flags as text, with the last part of absolute paths only."""
    words = []
    for flag in flags:
        name, equals, value = flag.rpartition("=")
        if os.path.isabs(value):
            value = Path(value).name
        words.append(name + equals + value)
    return " ".join(words)


def fingerprints(flags: list[str]) -> dict[str, str]:
    """Return a fingerprint of the model of each flag that names a model's folder.

    It is the beginning of a sha256 over the model's configuration and weights.
    """
    found = {}
    for flag, word in itertools.pairwise(flags):
        folder = Path(word)
        if (folder / "config.json").is_file():
            files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
            sums = "".join(file_entry(file)["sha256"] for file in files)
            found[flag] = hashlib.sha256(sums.encode()).hexdigest()[:12]
    return found
