"""Cases for `worker.py`, and the launches that run the cases of the selected tests."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dschat.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
MAINS = {
    1: ROOT / "training" / "step1_supervised_finetuning" / "main.py",
    2: ROOT / "training" / "step2_reward_model_finetuning" / "main.py",
    "dpo": ROOT / "training" / "step2_dpo_finetuning" / "main.py",
    3: ROOT / "training" / "step3_rlhf_finetuning" / "main.py",
}
# A launch counts as hung after START_S seconds plus CASE_S seconds per case.
START_S = 120
CASE_S = 60


@dataclass(frozen=True)
class Case:
    """One run of a step's main, or of a function, on some ranks.

    In the words of `argv` and the values of `kwargs`, {stock} stands for the shared folder of
    models and data, {cases} for the folder of all cases with as many ranks, and {out} for the
    folder of this case in it.
    """

    name: str
    ranks: int = 1
    step: int | str = 0  # a key of MAINS
    argv: str = ""  # the step's flags
    function: str = ""  # "file.py:name", the file beside this one or with its path in tests/
    kwargs: dict = field(default_factory=dict, hash=False)
    fails: bool = False  # it has to raise


@dataclass(frozen=True)
class Outcome:
    """The results that a case left."""

    out: Path
    ranks: list[dict]  # the results of `worker.py`

    @property
    def value(self):
        """Return the function's result on rank 0."""
        return self.ranks[0]["value"]

    def metrics(self) -> list[dict]:
        """Return the lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def per_step(self, key: str) -> list[float]:
        """Return a metric of every line of metrics.jsonl that has it."""
        return [line[key] for line in self.metrics() if key in line]


class Launches:
    """All cases of as many ranks in one launch, run when the first of them is asked for."""

    def __init__(self, cases: list[Case], *, folder: Path, stock: Path):
        self.cases, self.folder, self.stock = cases, folder, stock
        self._done: dict[str, Outcome] = {}
        self._failed: dict[str, str] = {}
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), "two cases of one name"

    def __getitem__(self, case: Case) -> Outcome:
        assert case in self.cases, f"{case.name} is not named by the test's mark `cases`"
        if case.name not in self._done and case.name not in self._failed:
            self._launch_all(case.ranks)
        assert case.name not in self._failed, f"{case.name}: {self._failed[case.name]}"
        return self._done[case.name]

    def _launch_all(self, ranks: int) -> None:
        cases = [case for case in self.cases if case.ranks == ranks]
        while cases:
            finished = self._launch(cases, ranks=ranks)
            # A launch ends at a case that failed; those after it get another.
            cases = cases[finished:]

    def _launch(self, cases: list[Case], *, ranks: int) -> int:
        """Run `cases` until one fails; return how many were run."""
        results = self.folder / f"{ranks}"
        results.mkdir(parents=True, exist_ok=True)
        plan = results / f"plan-{cases[0].name}.json"
        plan.write_text(
            json.dumps({"results": str(results), "cases": [self._entry(case) for case in cases]})
        )
        log = plan.with_suffix(".log")
        status = launch(
            [str(WORKER), str(plan)], ranks=ranks, log=log, timeout_s=START_S + CASE_S * len(cases)
        )
        for number, case in enumerate(cases):
            files = [results / f"{case.name}.{rank}.json" for rank in range(ranks)]
            found = [json.loads(file.read_text()) if file.exists() else None for file in files]
            failed = next(
                (result for result in found if result and not result["ok"] and not case.fails), None
            )
            if failed is None and None not in found:
                self._done[case.name] = Outcome(self._out(case), found)
                continue
            tail = log.read_text(errors="replace")[-4000:]
            self._failed[case.name] = (
                failed["traceback"] if failed else f"no result, launch ended {status}\n{tail}"
            )
            return number + 1
        return len(cases)

    def _out(self, case: Case) -> Path:
        return self.folder / f"{case.ranks}" / case.name

    def _entry(self, case: Case) -> dict:
        places = {
            "stock": self.stock,
            "cases": self.folder / f"{case.ranks}",
            "out": self._out(case),
        }

        def filled(value):
            return value.format(**places) if isinstance(value, str) else value

        entry = {"name": case.name, "fails": case.fails, "argv": None}
        if case.step:
            argv = [filled(word) for word in case.argv.split()]
            return {
                **entry,
                "file": str(MAINS[case.step]),
                "argv": ["--output_dir", str(self._out(case)), *argv],
            }
        file, _, function = case.function.partition(":")
        kwargs = {key: filled(value) for key, value in case.kwargs.items()}
        return {
            **entry,
            "file": str(Path(__file__).parent / file),
            "function": function,
            "kwargs": kwargs,
        }


def failing(launches, case: Case) -> list[str]:
    """Return the checks of a case that failed, and their ranks."""
    found = enumerate(launches[case].ranks)
    return [
        f"rank {rank}: {name}"
        for rank, result in found
        for name, holds in result["value"].items()
        if not holds
    ]


def launch(command: list[str], *, ranks: int, log: Path, timeout_s: float) -> int | str:
    """Run a script under the deepspeed launcher; return its exit status or "timed out"."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            launcher(ranks) + command,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def launcher(ranks: int) -> list[str]:
    """Return the deepspeed command that precedes a script, on a port that is free now."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return words + ["--master_port", str(free_port())]


def environment() -> dict[str, str]:
    """Return the environment with the repository on the path and one thread per process."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**quiet, **os.environ, "PYTHONPATH": path}
