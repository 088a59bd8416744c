"""Run a training command, and run it again from its newest checkpoint after a fault.

The supervisor is the parent of the launcher (DeepSpeed's, torchrun, srun) or of a single rank. It
ends what is left of a run that has failed or hangs, waits, and starts the same command with
``--resume latest``. The main writes a heartbeat after every update (``dschat.runtime.heartbeat``).
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dschat.runtime import heartbeat
from dschat.runtime.files import write_json
from dschat.runtime.run_record import RECORD

VARIABLE = "DSCHAT_RESTARTS"  # in the ranks: the number of restarts so far
DEFAULT_HANG_TIMEOUT_S = 1800.0
DEFAULT_RESTART_DELAY_S = 10.0
LONGEST_DELAY_S = 300.0
POLL_S = 0.2
TAIL_BYTES = 2**16
# After the launcher has ended, or was asked to end, its processes get this long before SIGKILL.
END_S = 10.0
# The same fault at the same update in a row: a run that fails of itself will do so again. A kill
# may come from outside twice by chance.
REPEATS_TO_STOP = 2
KILLS_TO_STOP = 3
PR_SET_CHILD_SUBREAPER = 36
# A cause may have several lines. Launchers' lines begin with a bracket.
CAUSE = re.compile(r"^error \(rank \d+\): (?P<cause>.*(?:\n(?!error |\[).+)*)", re.MULTILINE)
OTHER_RANK = re.compile(r"another rank of the run has ended|the process of rank \d+ has ended")
STOPPED = re.compile(r"^stopped \(rank \d+\): ", re.MULTILINE)
MEMORY = re.compile(r"OutOfMemoryError|out of memory|MemoryError|can't allocate memory")
KILLED = re.compile(r"return code = -(\d+)|exitcode *: -(\d+)|Signal (\d+) \(SIG")


@dataclass(frozen=True)
class RestartOptions:
    """The flags of a main that its supervisor reads."""

    max_restarts: int
    hang_timeout_s: float
    restart_delay_s: float
    output_dir: str


@dataclass(frozen=True)
class Fault:
    """The end of a run that was not meant to end."""

    kind: str  # "killed", "hang", "out of memory" or "error"
    cause: str
    update: int | None  # updates (step 3: rollouts) that were done; None: training had not begun

    @property
    def text(self) -> str:
        """The fault in one line."""
        place = "before training began"
        if self.update is not None:
            place = f"after update {self.update}"
        return f"{self.kind} {place}: {self.cause.splitlines()[0]}"


def is_restarted() -> bool:
    """Return whether a supervisor has started this run again."""
    return os.environ.get(VARIABLE, "0") != "0"


def restart_options(command: Sequence[str]) -> RestartOptions | None:
    """Return the supervisor's flags in a command; None if it has no --max_restarts above 0.

    Only words after the first that ends in ".py" count: launchers have a --max_restarts, too.
    """
    scripts = [number for number, word in enumerate(command) if word.endswith(".py")]
    if not scripts:
        return None
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--max_restarts", "--max-restarts", type=int, default=0)
    for name, default in (
        ("hang_timeout_s", DEFAULT_HANG_TIMEOUT_S),
        ("restart_delay_s", DEFAULT_RESTART_DELAY_S),
    ):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=float, default=default)
    parser.add_argument("--output_dir", "--output-dir", default="")
    try:
        found, _ = parser.parse_known_args(list(command[scripts[0] + 1 :]))
    except (SystemExit, argparse.ArgumentError):  # the main says what is wrong with the value
        return None
    if found.max_restarts < 1 or not found.output_dir:
        return None
    return RestartOptions(**vars(found))


def supervise(command: Sequence[str], options: RestartOptions) -> int:
    """Run `command` until it ends well, is asked to stop or cannot be helped by a restart.

    Args:
        command: starts a main; ``--resume latest`` is added to restart it.
        options: from ``restart_options``.

    Returns:
        The exit status of the last run. run.json then has a list ``restarts`` of the faults.
    """
    if sys.platform == "linux":
        # Processes whose parents have died become children of this one, so that none is missed.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    faults: list[Fault] = []
    notes: list[dict[str, Any]] = []
    with _Signals() as signals:
        while True:
            words = [*command, *(("--resume", "latest") if faults else ())]
            run = _Run(words, options, restarts=len(faults), signals=signals)
            fault = run.wait()
            if fault is not None:
                faults.append(fault)
                notes.append(
                    {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **vars(fault), "restarted": True}
                )
            end = "" if fault is None else reason_to_stop(faults, options.max_restarts)
            if end:
                notes[-1]["restarted"] = False
            _record(options.output_dir, notes)
            if fault is None:
                return run.status
            if end:
                _say(f"{fault.text}. Not restarted: {end}.")
                sys.stderr.write(f"\nerror: {fault.cause}\n")
                return run.status or 1
            seconds = delay_s(faults, options.restart_delay_s)
            _say(
                f"{fault.text}. Restart {len(faults)} of {options.max_restarts} in "
                f"{seconds:.0f} s, from the newest checkpoint."
            )
            if signals.wait(seconds):
                return 128 + signals.received


def reason_to_stop(faults: Sequence[Fault], max_restarts: int) -> str:
    """Return why a run is not restarted after the last of `faults`; "" if it is."""
    last = faults[-1]
    same = 0
    for fault in reversed(faults):
        if (fault.kind, fault.update) != (last.kind, last.update):
            break
        same += 1
    if last.kind == "error" and all(fault.update is None for fault in faults):
        return "it failed before training began, and would do so again"
    if same >= (KILLS_TO_STOP if last.kind == "killed" else REPEATS_TO_STOP):
        return f"the same fault came {same} times in a row at the same place"
    if len(faults) > max_restarts:
        return f"--max_restarts {max_restarts} is used up"
    return ""


def delay_s(faults: Sequence[Fault], first_s: float) -> float:
    """Return the seconds before a restart: twice as many for each fault without progress before."""
    without_progress = 0
    for before, after in zip(reversed(faults[:-1]), reversed(faults[1:])):
        if before.update != after.update:
            break
        without_progress += 1
    return min(first_s * float(2**without_progress), LONGEST_DELAY_S)


def fault_of(output: str, status: int, update: int | None) -> Fault:
    """Return the fault of a run that ended by itself.

    Args:
        output: its last lines.
        status: its exit status; negative: the signal that ended it.
        update: see ``Fault``.
    """
    causes = [found["cause"].strip() for found in CAUSE.finditer(output)]
    own = [cause for cause in causes if not OTHER_RANK.search(cause)]
    signals = [int(number) for found in KILLED.findall(output) for number in found if number]
    if status < 0:
        signals.append(-status)
    elif status > 128:
        signals.append(status - 128)
    if own:
        kind = "out of memory" if MEMORY.search(own[-1]) else "error"
        return Fault(kind, own[-1], update)
    if MEMORY.search(output):
        return Fault("out of memory", "the memory of the host or GPU was used up", update)
    if signals or causes:
        # A rank that is killed says nothing; the others report that it has ended.
        number = signals[0] if signals else int(signal.SIGKILL)
        name = f"signal {number}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(number).name
        return Fault("killed", f"a process was ended by {name}", update)
    return Fault("error", f"exit status {status}", update)


class _Signals:
    """Signals that ask the supervisor to stop; they are forwarded to its run."""

    def __init__(self) -> None:
        self.received = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._came = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward_to(self, process: subprocess.Popen[bytes]) -> None:
        """Forward signals to `process` from now on, with one that came before it started."""
        self._process = process
        if self.received:
            process.send_signal(self.received)

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether a signal has come."""
        return self._came.wait(seconds) or bool(self.received)

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        self._came.set()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


class _Run:
    """One run of the command."""

    def __init__(
        self,
        command: Sequence[str],
        options: RestartOptions,
        *,
        restarts: int,
        signals: _Signals,
    ) -> None:
        self.status = 0
        self._options = options
        self._signals = signals
        self._tail = b""
        heartbeat.clear(options.output_dir)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        signals.forward_to(self._process)
        self._reader = threading.Thread(target=self._copy_output, daemon=True)
        self._reader.start()

    def wait(self) -> Fault | None:
        """Wait for the end of the run and of all its processes; return its fault, or None."""
        hangs = False
        seen = heartbeat.last_beat(self._options.output_dir)
        since = time.monotonic()
        while self._process.poll() is None:
            time.sleep(POLL_S)
            beat = heartbeat.last_beat(self._options.output_dir)
            if beat != seen:
                seen = beat
                since = time.monotonic()
            if not hangs and not self._signals.received:
                hangs = time.monotonic() - since > self._options.hang_timeout_s
                if hangs:
                    self._end()
        _end_descendants()
        self._reader.join(END_S)
        status = self._process.returncode
        self.status = status if status >= 0 else 128 - status
        beat = heartbeat.last_beat(self._options.output_dir)
        heartbeat.clear(self._options.output_dir)
        output = self._tail.decode(errors="replace")
        asked = self._signals.received or STOPPED.search(output)
        if not hangs and (status == 0 or asked):
            return None
        update = beat[0] if beat else None
        if hangs:
            seconds = f"{self._options.hang_timeout_s:.0f} s"
            return Fault("hang", f"no update in {seconds} (--hang_timeout_s)", update)
        return fault_of(output, status, update)

    def _end(self) -> None:
        """Ask the launcher to end the run, also on other hosts; kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _copy_output(self) -> None:
        output = self._process.stdout
        assert output is not None
        while chunk := os.read(output.fileno(), TAIL_BYTES):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            with contextlib.suppress(OSError):  # the reader of this output is gone
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()


def _end_descendants() -> None:
    """Let the processes below this one end, then kill those that are left, and reap all."""
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=END_S)
    while alive:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_S)
        alive = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
        ]


def _record(output_dir: str, notes: list[dict[str, Any]]) -> None:
    """Write the faults so far to run.json, if the run has written it."""
    path = Path(output_dir) / RECORD
    if not notes:
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = [note for note in record.get("restarts", []) if note not in notes]
        write_json(path, {**record, "restarts": kept + notes})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError):
            _say(f"the fault is not recorded in {path} ({type(error).__name__}: {error})")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"\nsupervisor: {text}", flush=True)
