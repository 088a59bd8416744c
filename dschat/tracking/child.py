"""A command below this one: its output in a log and on the screen, and signals handed on to it."""

import contextlib
import os
import re
import signal
import subprocess
from collections import deque
from pathlib import Path
from typing import Callable, TextIO

# Lines of launchers and libraries: they go to the log, not to the screen.
NOISE = re.compile(
    r"^\[\d{4}-\d\d-\d\d|^\[transformers\]|^DeepSpeed deepspeed\.|Warning: |^\s*return func\(|^\[Gloo\]|^\[rank\d"
    r"|^(begin|end) bf16_ ?optimizer|^MA \d|^CPU Virtual Memory"
)
LAST_LINES = 15


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

    The process leads a session of its own. SIGINT and SIGTERM reach every process of it (DeepSpeed's command would end
    without a word to those below), and this one waits until they have saved and ended.

    Raises:
        RuntimeError: it failed; the message holds its last lines, the log's path and, last, the cause.
        KeyboardInterrupt: a signal came, and the command has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    with open(log, "a", encoding="utf-8") as file:
        pid, output = start()
        with _handed_on(pid) as received:
            for line in output:
                file.write(line)
                file.flush()
                if line.strip() and not NOISE.search(line):
                    last.append(line.rstrip())
                    print("  " + line.rstrip(), flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if received:
        raise KeyboardInterrupt
    if status != 0:
        cause = next((line for line in reversed(last) if line.startswith("error")), f"exit status {status}")
        raise RuntimeError("last lines:\n  " + "\n  ".join(last) + f"\nwhole log: {log}\n{cause}")


@contextlib.contextmanager
def _handed_on(pid: int):
    """Inside, SIGINT and SIGTERM go to all processes of the session of `pid`; yields those that came."""
    received: list[int] = []

    def hand_on(number: int, frame) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
