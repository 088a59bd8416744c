"""Supervised runs (--max_restarts) come back after kills, and equal an unbroken run to the bit."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launches import MAINS, environment
from runs import Run
from test_faults import SFT

from dschat.runtime.ports import free_port
from scripts import soak

FAULTS = 4  # of each of the eight slow tests
# Enough for a run on a loaded machine.
DEADLINE_S = 300.0


class Supervised:
    """A run under dschat's launcher, supervised."""

    def __init__(
        self, step: int | str, out: Path, argv: str, *, stock: Path, ranks: int, log: Path
    ):
        words = [word.format(stock=stock, out=out) for word in argv.split()]
        command = [sys.executable, "-m", "dschat.engine.deepspeed_runner"]
        command += ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command += [str(MAINS[step]), *words, "--output_dir", str(out)]
        self.out = out
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=log.parent,
                start_new_session=True,
            )

    def updates(self) -> int:
        """Return the number of lines of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_update(self, number: int) -> None:
        """Wait until metrics.jsonl has the line of update `number`."""
        deadline = time.monotonic() + DEADLINE_S
        while self.updates() <= number:
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.01)

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """Kill what is left of a run whose test has failed."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def supervised(stock, tmp_path):
    """Start runs, and end them with the test."""
    started = []

    def start(step: int | str, out: Path, argv: str, *, ranks: int) -> Supervised:
        run = Supervised(step, out, argv, stock=stock, ranks=ranks, log=tmp_path / "log")
        started.append(run)
        return run

    yield start
    for run in started:
        run.end()


def check_equal(run: Supervised, whole: Run) -> None:
    """Check that a supervised run ended like an unbroken one."""
    ended = Run(run.out, [0], 0.0, run.tail())
    assert ended.metrics() == whole.metrics()
    assert ended.weights() == whole.weights() and len(whole.weights()) > 10


def test_a_run_whose_rank_was_killed_comes_back(supervised, zygote, tmp_path, record):
    argv = f"{SFT} --max_train_steps 150 --save_interval 10 --background_save"
    whole = zygote.run(1, tmp_path / "whole", f"{SFT} --max_train_steps 150", ranks=2)
    assert whole.statuses == [0, 0], whole.log[-3000:]
    out = tmp_path / "out"
    run = supervised(1, out, f"{argv} --max_restarts 2 --restart_delay_s 0", ranks=2)
    run.wait_for_update(25)  # the save of 10 is complete: that of 20 has waited for it
    (holder,) = re.findall(r"process (\d+) on", (out / ".lock").read_text())
    os.kill(int(holder), signal.SIGKILL)
    killed = time.monotonic()
    while "supervisor: " not in run.tail():
        assert time.monotonic() - killed < 60, run.tail()
        time.sleep(0.05)
    said = run.log.read_text()
    assert "rank 1: another rank of the run has ended" in said
    assert re.search(r"killed after update \d+: .*Restart 1 of 2 in 0 s", said), said[-3000:]
    assert run.process.wait(DEADLINE_S) == 0, run.tail()
    assert re.search(r"resuming after update [1-9]\d*0\b", run.log.read_text())
    check_equal(run, whole)
    (note,) = json.loads((out / "run.json").read_text())["restarts"]
    assert note["kind"] == "killed" and note["restarted"] and 25 <= note["update"] < 150
    with pytest.raises(ProcessLookupError):
        os.killpg(run.process.pid, 0)
    record(injected=1, survived=1, **Run(out, [0], 0.0, "").lost(whole))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", soak.STEPS)
def test_faults_at_random_times_lose_no_byte(step, ranks, record):
    args = argparse.Namespace(
        minutes=60.0,
        faults=FAULTS,
        faults_per_run=FAULTS,
        steps=[step],
        ranks=[ranks],
        hang_s=90.0,
        longest_wait_s=8.0,
        seed=ranks,
    )
    figures = soak.soak(args)
    assert figures["faults"] == figures["survived"] == FAULTS and figures["bytes_lost"] == 0
    names = ("survived", "bytes_compared", "bytes_lost")
    record(injected=figures["faults"], **{name: figures[name] for name in names})
