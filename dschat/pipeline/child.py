"""A command below this one: its output in a log and on the screen, and signals handed on to it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Callable, TextIO

# Lines of launchers and libraries: they go to the log, not to the screen.
NOISE = re.compile(
    r"^\[\d{4}-\d\d-\d\d|^\[transformers\]|^DeepSpeed deepspeed\.|Warning: |^\s*return func\(|^\[Gloo\]|^\[rank\d"
    r"|^(begin|end) bf16_ ?optimizer|^MA \d|^CPU Virtual Memory"
)
LAST_LINES = 15
END_S = 30.0  # what a launcher, too, gives its processes to save before it kills them


def start_process(command: list[str], environment: dict[str, str]) -> tuple[int, TextIO]:
    """The process id of `command`, in a session of its own, and its output."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    return process.pid, process.stdout


def run_logged(start: Callable[[], tuple[int, TextIO]], log: Path) -> None:
    """Call `start() -> (process id, output)`; the output goes on the screen without launchers' noise, and to the end of `log`.

    The process leads a session of its own. SIGINT, SIGTERM and SIGHUP (the terminal is gone) reach every process of it
    (DeepSpeed's command would end without a word to those below), and this one waits until they have saved and ended.
    Where log or screen cannot be written, the run goes on without; whatever else is raised here ends the session.

    Raises:
        RuntimeError: it failed; the message holds its last lines, the log's path and, last, the cause.
        KeyboardInterrupt: a signal came, and the command has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    # Without a buffer nothing is left to be written, and to fail once more, when the file is closed.
    with open(log, "ab", buffering=0) as file, _handed_on() as signals:
        pid, output = start()
        try:
            signals.go_to(pid)
            lost = False
            for line in output:
                try:
                    file.write(line.encode())
                except OSError as error:
                    if not lost:
                        _show(
                            f"{log} cannot be written ({error.strerror}): some of its lines will be missing"
                        )
                    lost = True
                if line.strip() and not NOISE.search(line):
                    last.append(line.rstrip())
                    _show(line.rstrip())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            _end(pid)
            raise
    if signals.received:
        raise KeyboardInterrupt
    if status != 0:
        cause = next(
            (line for line in reversed(last) if line.startswith("error")), f"exit status {status}"
        )
        raise RuntimeError("last lines:\n  " + "\n  ".join(last) + f"\nwhole log: {log}\n{cause}")


def _show(line: str) -> None:
    try:
        print("  " + line, flush=True)
    except OSError:  # the terminal is gone, or who read the pipe
        sys.stdout = open(os.devnull, "w")


class _Signals:
    """Those that came, handed on to all processes of a session, as soon as there is one."""

    def __init__(self):
        self.received: list[int] = []
        self._pid = 0

    def go_to(self, pid: int) -> None:
        """Hand them on to the session of `pid` from now on."""
        self._pid = pid
        if self.received:
            self._hand_on()

    def note(self, number: int, frame) -> None:
        """The handler."""
        self.received.append(number)
        if self._pid:
            self._hand_on()

    def _hand_on(self) -> None:
        try:
            os.killpg(self._pid, signal.SIGTERM)
        except ProcessLookupError:  # it has ended, or is about to make its session
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)


@contextlib.contextmanager
def _handed_on():
    """Inside, the signals that end a program are noted and handed on; yields the `_Signals`."""
    signals, numbers = _Signals(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signals.note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(pid: int) -> None:
    """Have all processes of the session of `pid` save and end; those that are left after a while are killed."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):  # waited for before
                os.waitpid(pid, os.WNOHANG)
            os.killpg(pid, 0)
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
