"""Runs through `zygote.py`, and the files that they leave."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launches import MAINS, environment
from safetensors.torch import load_file

TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Run:
    """A run of a step's main that has ended."""

    out: Path
    statuses: list[int]  # of each rank; negative: the signal that ended it
    seconds: float
    log: str  # what this run printed, of all ranks

    def metrics(self) -> list[dict]:
        """Return the lines of metrics.jsonl without values that differ from run to run."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key[:5] not in ("time/", "perf/")}
            for line in lines
        ]

    def weights(self) -> dict[str, str]:
        """Return the sum of each saved model's tensors, by model and name."""
        found = {}
        for file in sorted(self.out.glob("**/model*.safetensors")):
            for name, tensor in load_file(file).items():
                found[f"{file.relative_to(self.out)} {name}"] = hashlib.sha256(
                    tensor.numpy().tobytes()
                ).hexdigest()
        return found

    def lost(self, whole: "Run") -> dict[str, int]:
        """Count the bytes of the saved models and metrics.jsonl, and those that differ from the
        unbroken run.
        """
        compared = differing = 0
        mine = self._bytes()
        theirs = whole._bytes()
        for name in mine.keys() | theirs.keys():
            ours = mine.get(name, b"")
            other = theirs.get(name, b"")
            compared += max(len(ours), len(other))
            differing += abs(len(ours) - len(other)) + sum(a != b for a, b in zip(ours, other))
        return {"bytes_compared": compared, "bytes_lost": differing}

    def _bytes(self) -> dict[str, bytes]:
        files = self.out.glob("**/model*.safetensors")
        found = {str(file.relative_to(self.out)): file.read_bytes() for file in files}
        return {
            **found,
            "metrics.jsonl": "\n".join(json.dumps(line) for line in self.metrics()).encode(),
        }

    def checkpoints(self) -> list[str]:
        """Return the names in the folder of checkpoints."""
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())


@dataclass(frozen=True)
class Started:
    """A run in progress; its process group is that of its first rank."""

    out: Path
    pids: list[int]
    log: Path
    seen: int  # bytes of the log that are of earlier runs
    when: float

    def kill(self) -> None:
        """Send SIGKILL to all ranks."""
        os.killpg(self.pids[0], signal.SIGKILL)

    def kill_rank(self, rank: int) -> None:
        """Send SIGKILL to one rank."""
        self.signal_rank(rank, signal.SIGKILL)

    def signal_rank(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], number)

    def wait_for_step(self, step: int) -> None:
        """Wait until metrics.jsonl has the line of `step`."""
        path = self.out / "metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        while not (path.exists() and path.read_bytes().count(b"\n") > step):
            assert time.monotonic() < deadline, (
                f"no step {step} in {TIMEOUT_S} s: {self.log.read_text()[-3000:]}"
            )
            time.sleep(0.002)


class Zygote:
    """The process that runs are forked from."""

    def __init__(self, stock: Path, log: Path):
        self.stock = stock
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),
            text=True,
            env=environment(),
        )

    def run(self, step: int, out: Path, argv: str, *, timeout_s: float = TIMEOUT_S, **job) -> Run:
        """Run step `step` into the folder `out`, and wait for its end; see ``start``."""
        return self.wait(self.start(step, out, argv, **job), timeout_s=timeout_s)

    def start(self, step: int, out: Path, argv: str, *, ranks: int = 1, **job) -> Started:
        """Start step `step` into the folder `out`.

        Args:
            argv: its flags; {stock} and {out} are filled in.
            job: what shall happen to it; see zygote.py.
        """
        log = job.pop("log", out.with_suffix(".log"))
        seen = log.stat().st_size if log.exists() else 0
        words = [
            "--output_dir",
            str(out),
            *(word.format(stock=self.stock, out=out) for word in argv.split()),
        ]
        pids = self._ask(
            {"main": str(MAINS[step]), "argv": words, "ranks": ranks, "log": str(log), **job}
        )["pids"]
        return Started(out, pids, log, seen, time.monotonic())

    def wait(self, started: Started, *, timeout_s: float = TIMEOUT_S) -> Run:
        """Wait for a run's end."""
        statuses = self._ask({"wait": started.pids, "timeout_s": timeout_s})["statuses"]
        with open(started.log, errors="replace") as file:
            file.seek(started.seen)
            return Run(started.out, statuses, time.monotonic() - started.when, file.read())

    def _ask(self, job: dict) -> dict:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        # Imported libraries print lines too.
        while not (line := self._process.stdout.readline()).startswith("{"):
            assert line, "the process that runs are forked from has ended"
        return json.loads(line)

    def end(self) -> None:
        """End the zygote."""
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)
