"""Run the fault tests and count the faults, the survived ones, and the bytes of results lost.

    python scripts/count_faults.py --output docs/results/faults.json
    python scripts/count_faults.py --slow    # with all combinations of exact resume

It needs what the tests need: bash scripts/test.sh once, or pip install -e .[test].

A fault is survived if the run, or the same command with --resume latest, continues and ends with
the weights and metrics of an uninterrupted run. Bytes of the saved models and of metrics.jsonl,
without its times, are compared one by one. A test that fails records nothing: its faults are
missing from the first two numbers, and the exit status is 1.
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
from dschat.runtime.hardware import hardware, versions  # noqa: E402

COUNTS = ("injected", "survived", "bytes_compared", "bytes_lost")


def total(figures: dict[str, dict]) -> dict[str, int]:
    """Return each count summed over all tests."""
    return {name: sum(figure.get(name, 0) for figure in figures.values()) for name in COUNTS}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write; default: only print")
    parser.add_argument("--slow", action="store_true", help="add the tests marked slow")
    return parser.parse_args()


def main() -> int:
    """Run the tests, print the counts, and return pytest's exit status."""
    args = parse_args()
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
    counts = total(figures)
    print(
        f"faults {counts['injected']}, survived {counts['survived']}, "
        f"bytes compared {counts['bytes_compared']}, lost {counts['bytes_lost']}"
    )
    if args.output:
        flags = ["--slow"] if args.slow else []
        record = {
            "command": " ".join(["python", "scripts/count_faults.py", *flags]),
            "pytest": done.stdout.strip().splitlines()[-1],
            "seconds": round(seconds, 1),
            **counts,
            "hardware": hardware(),
            "versions": versions(),
            "tests": figures,
        }
        write_json(Path(args.output), record)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
