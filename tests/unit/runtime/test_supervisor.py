"""Restarts after faults: scripted runs under the real supervisor, and its rules."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dschat.config.parse import parse_config
from dschat.config.sft import SFTConfig
from dschat.runtime import supervisor
from dschat.runtime.supervisor import Fault, delay_s, fault_of, reason_to_stop, restart_options

# Run number N does what line N of the plan says: "UPDATE how it ends".
SCRIPT = """
import os, signal, subprocess, sys, time
from dschat.runtime.heartbeat import beat
number = int(os.environ["DSCHAT_RESTARTS"])
out = sys.argv[sys.argv.index("--output_dir") + 1]
update, end = open(out + "/plan").read().splitlines()[number].split(" ", 1)
open(out + "/words", "a").write(" ".join(sys.argv[1:]) + "\\n")
if number == 0:
    open(out + "/run.json", "w").write('{"step": "Step 1"}')
if int(update) >= 0:
    beat(out, int(update))
if end == "hang":
    # A process that has lost its parent and is in another session.
    if os.fork() == 0:
        sleeping = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        open(out + "/orphan", "w").write(str(sleeping.pid))
        os._exit(0)
    time.sleep(1000)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open(out + "/waits", "w")
    try:
        time.sleep(1000)
    finally:
        print("stopped (rank 0): saved")
print(end)
sys.exit(end != "good")
"""
QUICK = """
import sys
from dschat import supervise
from dschat.runtime import supervisor
supervisor.END_S = 0.5
sys.exit(supervise.main())
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(SCRIPT)

    def started(plan: list[str], *flags: str) -> subprocess.Popen:
        (tmp_path / "plan").write_text("\n".join(plan))
        words = [sys.executable, "-c", QUICK, sys.executable, str(script)]
        words += ["--output_dir", str(tmp_path), "--max_restarts", "3", "--restart_delay_s", "0.01"]
        return subprocess.Popen(
            [*words, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return started


def test_a_run_is_restarted_from_its_newest_checkpoint_until_it_ends(start, tmp_path):
    plan = ["3 kill", "5 hang", "5 error (rank 1): RuntimeError: boom", "9 good"]
    run = start(plan, "--hang_timeout_s", "1.5")
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    first, *later = (tmp_path / "words").read_text().splitlines()
    assert "--resume" not in first and len(later) == 3
    assert all(words == f"{first} --resume latest" for words in later)
    assert "killed after update 3: a process was ended by SIGKILL. Restart 1 of 3 in 0 s" in output
    assert "hang after update 5: no update in 2 s (--hang_timeout_s). Restart 2 of 3" in output
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["step"] == "Step 1"
    found = [(note["kind"], note["update"], note["restarted"]) for note in record["restarts"]]
    assert found == [("killed", 3, True), ("hang", 5, True), ("error", 5, True)]
    assert record["restarts"][2]["cause"] == "RuntimeError: boom"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "orphan").read_text()), 0)
    assert not (tmp_path / ".heartbeat").exists()


def test_a_fault_that_repeats_stops_with_its_cause_last(start, tmp_path):
    message = "error (rank 0): The loss of update 8 is nan. Lower --learning_rate."
    run = start([f"7 {message}"] * 4)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert output.rstrip().endswith("error: The loss of update 8 is nan. Lower --learning_rate.")
    assert "Not restarted: the same fault came 2 times in a row" in output
    notes = json.loads((tmp_path / "run.json").read_text())["restarts"]
    assert [note["restarted"] for note in notes] == [True, False]


def test_a_stop_that_was_asked_for_is_not_undone(start, tmp_path):
    run = start(["4 wait"])
    deadline = time.monotonic() + 30
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 143 and "stopped (rank 0): saved" in output
    assert "supervisor:" not in output and len((tmp_path / "words").read_text().splitlines()) == 1


def fault(kind: str, update: int | None) -> Fault:
    return Fault(kind, "a cause", update)


@pytest.mark.parametrize(
    "faults, words",
    [
        ([fault("error", None)], "before training began"),
        ([fault("killed", None)], ""),
        ([fault("error", 3)], ""),
        ([fault("error", 3), fault("error", None)], ""),
        ([fault("out of memory", 3)] * 2, "2 times in a row"),
        ([fault("hang", 3), fault("error", 3), fault("hang", 3)], ""),
        ([fault("killed", 3)] * 2, ""),
        ([fault("killed", 3)] * 3, "3 times in a row"),
        ([fault("killed", update) for update in range(5)], ""),
        ([fault("killed", update) for update in range(6)], "--max_restarts 5 is used up"),
    ],
)
def test_reasons_to_stop(faults, words):
    reason = reason_to_stop(faults, 5)
    assert words in reason and bool(words) == bool(reason)


def test_the_delay_doubles_without_progress():
    faults = [fault("killed", 1)]
    assert delay_s(faults, 10) == 10
    faults += [fault("hang", 1), fault("error", 1)]
    assert delay_s(faults, 10) == 40
    assert delay_s([*faults, fault("error", 2)], 10) == 10
    assert delay_s([fault("killed", 1)] * 9, 10) == 300


@pytest.mark.parametrize(
    "output, status, kind, cause",
    [
        ("", -9, "killed", "a process was ended by SIGKILL"),
        ("", 137, "killed", "a process was ended by SIGKILL"),
        ("[launch.py:1] [] exits with return code = -6", 250, "killed", "SIGABRT"),
        (
            "error (rank 1): RuntimeError: another rank of the run has ended: see its error\n",
            1,
            "killed",
            "SIGKILL",
        ),
        (
            "error (rank 0): NCCL gone\nerror (rank 1): the process of rank 0 has ended, so",
            1,
            "error",
            "NCCL gone",
        ),
        ("x\nerror (rank 0): OutOfMemoryError: CUDA\nadvice\n\n", 1, "out of memory", "advice"),
        ("slurmstepd: error: Detected 1 oom_kill event: out of memory", 1, "out of memory", "used"),
        ("", 3, "error", "exit status 3"),
    ],
)
def test_the_kind_of_a_fault(output, status, kind, cause):
    found = fault_of(output, status, 4)
    assert (found.kind, found.update) == (kind, 4) and cause in found.cause


def test_only_the_flags_of_the_main_count():
    words = ["torchrun", "--max_restarts", "7", "main.py", "--output-dir", "out"]
    assert restart_options(words) is None
    found = restart_options([*words, "--max-restarts=2", "--hang_timeout_s", "60"])
    assert (found.max_restarts, found.hang_timeout_s, found.output_dir) == (2, 60.0, "out")
    assert restart_options([*words, "--max_restarts", "two"]) is None
    assert restart_options(["main", "--max_restarts", "2"]) is None


def test_a_run_that_nothing_restarts_is_refused(monkeypatch, tmp_path):
    words = ["--model_name_or_path", "m", "--max_restarts", "2"]
    with pytest.raises(ValueError, match="--max_restarts 2 needs --output_dir and --save_interval"):
        parse_config(SFTConfig, words)
    words += ["--output_dir", str(tmp_path), "--save_interval", "5"]
    with pytest.raises(ValueError, match="python -m dschat.supervise before"):
        parse_config(SFTConfig, words)
    assert parse_config(SFTConfig, [*words, "--dry_run"]).run.max_restarts == 2
    monkeypatch.setenv(supervisor.VARIABLE, "0")
    assert parse_config(SFTConfig, words).run.max_restarts == 2
