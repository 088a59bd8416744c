"""After a signal, the launcher gives ranks the time of their longest update; a second one ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dschat.engine import deepspeed_launch
from dschat.engine.deepspeed_launch import RankEnd
from dschat.runtime import grace
from dschat.runtime.ports import free_port

# A rank that finishes its update after SIGTERM.
RANK = """
import signal, sys, time
def save(*_):
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, save)
print("trains", flush=True)
time.sleep(60)
"""


@pytest.fixture
def short(monkeypatch):
    """Give ranks half a second, and two while no update is known."""
    monkeypatch.setattr(grace, "SHORTEST_S", 0.5)
    monkeypatch.setattr(grace, "FIRST_S", 2.0)


def rank(update_s: float) -> subprocess.Popen:
    words = [sys.executable, "-c", RANK, str(update_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "trains\n"
    return process


def report(monkeypatch, file, *updates: float) -> None:
    monkeypatch.setattr(grace, "_longest_s", 0.0)
    monkeypatch.setenv(grace.VARIABLE, str(file))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for seconds in updates:
        grace.report_update(seconds)


@pytest.mark.parametrize(
    "updates, update_s, saved",
    [((0.1, 1.0, 0.2), 1.5, True), ((0.1,), 1.5, False), ((), 1.0, True)],
    ids=["an-update-of-known-length", "longer-than-any-before", "the-first"],
)
def test_a_rank_gets_the_time_of_the_longest_update(
    updates, update_s, saved, short, tmp_path, monkeypatch
):
    report(monkeypatch, tmp_path / "grace", *updates)
    process = rank(update_s)
    RankEnd(tmp_path / "grace", num_ranks=1)(process.pid)
    assert process.wait(1) == (0 if saved else -signal.SIGKILL)
    assert process.stdout.read() == ("saved\n" if saved else "")


def test_after_the_failure_of_a_rank_the_others_get_no_more_than_usual(
    short, tmp_path, monkeypatch
):
    report(monkeypatch, tmp_path / "grace", 5.0)
    process = rank(5.0)
    started = time.monotonic()
    RankEnd(tmp_path / "grace", num_ranks=2)(process.pid)
    assert process.wait(1) == -signal.SIGKILL and time.monotonic() - started < 3


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_launch, "REPEATED_WITHIN_S", 0.2)
    process = rank(30.0)
    end = RankEnd(tmp_path / "grace", num_ranks=1)
    before = signal.signal(signal.SIGALRM, lambda *_: end(process.pid))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        started = time.monotonic()
        end(process.pid)
        process.wait(1)
        assert process.stdout.read() == "" and time.monotonic() - started < 15
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_runner_starts_the_launch_that_waits(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "def save(*_):\n"
        "    time.sleep(2)\n"
        f"    Path({str(tmp_path)!r}, 'saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"Path(os.environ['{grace.VARIABLE}']).write_text('1.0')\n"
        f"Path({str(tmp_path)!r}, 'launcher').write_text(str(os.getppid()))\n"
        "time.sleep(60)\n"
    )
    # Of DeepSpeed's 30 s, 0.5 are left.
    code = "from dschat.runtime import grace; grace.SHORTEST_S = 0.5\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])
    words = ["--hostfile", "", "--num_accelerators", "1", "--master_port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "dschat.engine.deepspeed_runner", *words, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "launcher").exists() or not (tmp_path / "launcher").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(int((tmp_path / "launcher").read_text()), signal.SIGTERM)
    assert process.wait(30) == 1 and (tmp_path / "saved").exists()


def test_the_hint_names_the_launcher_that_does_not_wait(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.delenv(grace.VARIABLE, raising=False)
    monkeypatch.setattr(grace, "_longest_s", 42.0)
    assert "up to 42 s" in grace.launcher_hint()
    assert "dschat.engine.deepspeed_runner" in grace.launcher_hint()
    monkeypatch.setattr(grace, "_longest_s", 4.0)
    assert grace.launcher_hint() == ""
    monkeypatch.setattr(grace, "_longest_s", 42.0)
    monkeypatch.setenv(grace.VARIABLE, "file")
    assert grace.launcher_hint() == ""
