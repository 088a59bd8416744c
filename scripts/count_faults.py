"""Inject the faults of tests/faults and count: how many, how many were survived, and how many bytes of the results were lost.

    python scripts/count_faults.py --output docs/results/faults.json
    python scripts/count_faults.py --slow    # the whole product of exact resume too

It needs what the tests need: bash scripts/test.sh once, or pip install -e .[test].

A fault is survived if the run continues, or the same command with --resume latest does, and ends with the weights and
metrics of an unbroken run. Bytes are compared one by one, of the saved models and of metrics.jsonl without its times. A
test that fails records nothing, so that its faults are missing from the first two numbers, and the exit status is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions

SUMS = ("injected", "survived", "bytes_compared", "bytes_lost")


def total(figures: dict[str, dict]) -> dict[str, int]:
    """The sums over all tests."""
    return {name: sum(figure.get(name, 0) for figure in figures.values()) for name in SUMS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write; default: print alone")
    parser.add_argument("--slow", action="store_true", help="add the tests marked slow")
    args = parser.parse_args()
    marks = "slow or not slow" if args.slow else "not slow"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "tests/faults/test_faults.py"]
    command += ["tests/faults/test_full_disk.py", "tests/faults/test_exact_resume.py"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        started = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "DSCHAT_FAULT_FIGURES": str(path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.monotonic() - started
        figures = json.loads(path.read_text()) if path.exists() else {}
    print(done.stdout)
    found = total(figures)
    print(
        "faults {injected}, survived {survived}, bytes compared {bytes_compared}, lost {bytes_lost}".format(
            **found
        )
    )
    if args.output:
        record = {
            "command": " ".join(
                ["python", "scripts/count_faults.py", *(["--slow"] if args.slow else [])]
            ),
            "pytest": done.stdout.strip().splitlines()[-1],
            "seconds": round(seconds, 1),
            **found,
            "hardware": hardware(),
            "versions": versions(),
            "tests": figures,
        }
        write_json(Path(args.output), record)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
