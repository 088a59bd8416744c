"""Run a command: copy its output to a log and the screen, and forward signals to it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from dschat.runtime.live_line import LiveLine, has_terminal

# Lines of launchers and libraries, which are in the log but not on the screen.
NOISE = re.compile(
    r"^\[\d{4}-\d\d-\d\d|^\[transformers\]|^DeepSpeed deepspeed\.|Warning: |^\s*return func\(|"
    r"^\[Gloo\]|^\[rank\d"
    r"|^(begin|end) bf16_ ?optimizer|^MA \d|^CPU Virtual Memory"
)
PROGRESS = re.compile(r"\w+  (?:.*  )?(?:step|batch) (\d+)/(\d+)  \d+%  ")
LAST_LINES = 15
END_S = 30.0  # launchers give their processes as long to save before they kill them


def start_process(command: list[str], environment: dict[str, str]) -> tuple[int, IO[str]]:
    """Start `command` in a new session and return its process id and its output."""
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


def run_logged(start: Callable[[], tuple[int, IO[str]]], log: Path) -> None:
    """Start a process and wait for its end; append its output to `log` and show it on the screen.

    Launchers' noise is not shown. SIGINT, SIGTERM and SIGHUP (the terminal is gone) are forwarded
    to every process of the session, since DeepSpeed's command would end without a word to its
    ranks. This process then waits until they have saved and ended. The run continues if log or
    screen cannot be written. Any other exception raised here ends the session.

    Args:
        start: ``start() -> (process id, output)``. The process has to lead a new session.
        log: file to append the output to.

    Raises:
        RuntimeError: the command failed. The message holds its last lines, the path of the log and,
            last, the cause.
        KeyboardInterrupt: a signal was received, and the command has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    # Unbuffered: a buffer would be written when the file is closed, and fail again.
    with open(log, "ab", buffering=0) as file, _forwarded_signals() as signals:
        pid, output = start()
        try:
            signals.forward_to(pid)
            _copy_output(output, file, log, last)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            _end(pid)
            raise
    if signals.received:
        raise KeyboardInterrupt
    if status != 0:
        errors = [line for line in last if line.startswith("error")]
        cause = errors[-1] if errors else f"exit status {status}"
        raise RuntimeError("last lines:\n  " + "\n  ".join(last) + f"\nwhole log: {log}\n{cause}")


def _copy_output(output: IO[str], file, log: Path, last: deque[str]) -> None:
    """Write each line to `file`; show it and keep it in `last` unless it is noise."""
    warned = False
    screen = _Screen()
    for line in output:
        try:
            file.write(line.encode())
        except OSError as error:
            if not warned:
                screen.show(
                    f"{log} cannot be written ({error.strerror}): some lines will be missing"
                )
            warned = True
        if line.strip() and not NOISE.search(line):
            last.append(line.rstrip())
            screen.show(line.rstrip())
    screen.close()


class _Screen:
    """Shows the lines of a command; on a terminal its progress line is live."""

    def __init__(self):
        self._line = LiveLine(sys.stdout) if has_terminal() else None

    def show(self, line: str) -> None:
        """Show a line."""
        try:
            if self._line is None:
                print("  " + line, flush=True)
            elif _is_progress(line):
                self._line.show("  " + line)
            else:
                self._line.write("  " + line)
        except OSError:  # the terminal, or the reader of the pipe, is gone
            self._line = None
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def close(self) -> None:
        """Remove the live line."""
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.clear()


def _is_progress(line: str) -> bool:
    """Return whether a line is of ``Progress`` or ``ReportedBatches``, and not its last."""
    found = PROGRESS.match(line)
    return bool(found) and found[1] != found[2]


class _Signals:
    """Received signals, forwarded to all processes of a session as soon as it exists."""

    def __init__(self):
        self.received: list[int] = []
        self._pid = 0

    def forward_to(self, pid: int) -> None:
        """Forward signals to the session of `pid` from now on, with those already received."""
        self._pid = pid
        if self.received:
            self._forward()

    def handle(self, number: int, frame) -> None:
        """Note a signal and forward it."""
        self.received.append(number)
        if self._pid:
            self._forward()

    def _forward(self) -> None:
        try:
            os.killpg(self._pid, signal.SIGTERM)
        except ProcessLookupError:  # it has ended, or has not made its session yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)


@contextlib.contextmanager
def _forwarded_signals():
    """Handle the signals that end a program by a ``_Signals``, which is yielded."""
    signals = _Signals()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(pid: int) -> None:
    """Let the processes of the session of `pid` save and end; kill those that do not in time."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):  # waited for before
                os.waitpid(pid, os.WNOHANG)
            os.killpg(pid, 0)
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
