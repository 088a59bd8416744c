"""run_logged: child processes receive its signals and never outlive it."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest

from dschat.pipeline import child

ROOT = Path(__file__).resolve().parents[3]
# A process that writes down its id and saves on SIGTERM; it ends by itself after a minute.
BELOW = (
    "trap 'echo saved; exit 3' TERM; echo $$ >{pid}; echo begun; "
    "for i in $(seq 600); do sleep 0.1; done"
)
ABOVE = """
import os, sys
from functools import partial
from pathlib import Path
from dschat.pipeline.child import run_logged, start_process
try:
    command = ["bash", "-c", sys.argv[1]]
    run_logged(partial(start_process, command, dict(os.environ)), Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(7)
"""


def ended(pid: int) -> bool:
    """Return whether the process ends within ten seconds; kill it otherwise."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    return False


def noted(file: Path) -> int:
    """Wait for `file` and return the process id in it."""
    for _ in range(300):
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text())
        time.sleep(0.1)
    raise AssertionError("the process did not start")


def take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup


def test_a_run_saves_and_ends_when_its_terminal_is_lost(tmp_path):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ABOVE, BELOW.format(pid=tmp_path / "pid"), str(tmp_path / "log")],
        cwd=ROOT,
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    pid = noted(tmp_path / "pid")
    while "begun" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    os.close(main)  # the kernel sends SIGHUP, and writes to the screen fail from here on
    status = process.wait(30)
    assert ended(pid), "the child process is still running"
    assert status == 7 and (tmp_path / "log").read_text().endswith("saved\n")


def test_sighup_that_is_ignored_stays_ignored(tmp_path):
    words = [
        "nohup",
        sys.executable,
        "-c",
        ABOVE,
        f"echo $$ >{tmp_path}/pid; sleep 2; echo done",
        str(tmp_path / "log"),
    ]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    noted(tmp_path / "pid")
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "done" in said, said


def test_the_run_continues_without_a_reader_of_its_output(tmp_path):
    words = [
        sys.executable,
        "-c",
        ABOVE,
        "echo one; sleep 1; echo two; echo three",
        str(tmp_path / "log"),
    ]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "  one\n"
    process.stdout.close()
    assert process.wait(30) == 0, process.stderr.read()
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"
    process.stderr.close()


def test_a_log_that_cannot_be_written_is_reported_once(capsys):
    start = partial(
        child.start_process, ["sh", "-c", "echo one; sleep 0.2; echo two"], dict(os.environ)
    )
    child.run_logged(start, Path("/dev/full"))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "No space" not in line] == ["  one", "  two"]
    assert len(said) == 3 and "/dev/full cannot be written (No space left on device)" in said[0]


@pytest.mark.parametrize(
    "below", [BELOW, BELOW.replace("'echo saved; exit 3'", "''")], ids=["saves", "does not listen"]
)
def test_any_exception_ends_the_run(below, tmp_path, monkeypatch):
    class Broken:
        def search(self, line):
            raise MemoryError

    monkeypatch.setattr(child, "NOISE", Broken())
    monkeypatch.setattr(child, "END_S", 2.0)
    words = ["bash", "-c", below.format(pid=tmp_path / "pid")]
    with pytest.raises(MemoryError):
        child.run_logged(partial(child.start_process, words, dict(os.environ)), tmp_path / "log")
    assert ended(noted(tmp_path / "pid"))


def test_a_signal_received_before_the_process_exists_is_forwarded(tmp_path):
    def start():
        os.kill(os.getpid(), signal.SIGTERM)
        return child.start_process(["sleep", "20"], dict(os.environ))

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that this process does not end
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            child.run_logged(start, tmp_path / "log")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 10


def test_a_forked_launcher_does_not_inherit_signal_handlers(tmp_path, monkeypatch):
    from dschat.engine import fork_launcher

    def say_handlers():
        found = [
            callable(signal.getsignal(number))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ]
        os.write(1, f"{found}\n".encode())

    monkeypatch.setattr(fork_launcher.deepspeed_launch, "main", say_handlers)
    start = partial(
        fork_launcher.start_launcher, [], num_processes=1, master_port=1, environment={}
    )
    child.run_logged(start, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "[False, False, False]\n"


@pytest.mark.parametrize(
    "line, live",
    [
        ("SFT  step 12/40  30%  loss 3.9  left 0:43", True),
        ("PPO  evaluation, scoring  batch 3/12  25%  mem 3.1/24.0 GiB  left 0:43", True),
        ("SFT  step 40/40  100%  loss 3.9  left 0:00", False),
        ("SFT  evaluation, update 20: loss 4.268  perplexity 71.34", False),
        ("step 1: rows.jsonl (prompt): 256 train rows, 64 eval rows", False),
        ("saved output/step 1/40  30%", False),
    ],
)
def test_progress_lines_are_live_except_the_last(line, live):
    assert child._is_progress(line) == live


def test_the_screen_of_a_command_is_live_on_a_terminal(monkeypatch):
    shown = []

    class Line:
        def __init__(self, stream):
            pass

        def show(self, text):
            shown.append(("live", text))

        def write(self, text):
            shown.append(("stays", text))

        def clear(self):
            shown.append(("clear", ""))

    monkeypatch.setattr(child, "LiveLine", Line)
    monkeypatch.setattr(child, "has_terminal", lambda: True)
    screen = child._Screen()
    screen.show("SFT  step 1/4  25%  loss 1")
    screen.show("saved out")
    screen.close()
    assert shown == [
        ("live", "  SFT  step 1/4  25%  loss 1"),
        ("stays", "  saved out"),
        ("clear", ""),
    ]
