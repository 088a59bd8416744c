"""Runs through `zygote.py`, and what they leave behind."""

import json
import subprocess
import sys
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
        """The lines of metrics.jsonl without what differs from run to run."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key[:5] not in ("time/", "perf/")} for line in lines]

    def weights(self) -> dict[str, bytes]:
        """Each saved model's tensors as bytes, by model and name."""
        found = {}
        for file in sorted(self.out.glob("**/model*.safetensors")):
            for name, tensor in load_file(file).items():
                found[f"{file.relative_to(self.out)} {name}"] = tensor.numpy().tobytes()
        return found

    def checkpoints(self) -> list[str]:
        """The names in the folder of checkpoints."""
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())


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

    def run(self, step: int, out: Path, argv: str, *, ranks: int = 1, **job) -> Run:
        """Run step `step` into the folder `out`, and wait for its end.

        Args:
            argv: its flags; {stock} and {out} are filled in.
            job: what shall happen to it; see zygote.py.
        """
        log = out.with_suffix(".log")
        seen = log.stat().st_size if log.exists() else 0
        words = ["--output_dir", str(out), *(word.format(stock=self.stock, out=out) for word in argv.split())]
        job = {"main": str(MAINS[step]), "argv": words, "ranks": ranks, "log": str(log), "timeout_s": TIMEOUT_S, **job}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = None
        while answer is None or "statuses" not in answer:
            answer = self._answer()
        with open(log, errors="replace") as file:
            file.seek(seen)
            return Run(out, answer["statuses"], answer["seconds"], file.read())

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        assert line, "the process that runs are forked from has ended"
        return json.loads(line) if line.startswith("{") else {}

    def end(self) -> None:
        """Let it go."""
        self._process.stdin.close()
        self._process.wait(30)
