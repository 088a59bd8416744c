"""Reward functions in separate processes, so that they run in parallel and can be stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from dschat.rewards.references import MissingColumn

START_S = 120.0  # for a worker to import the function
EXIT_S = 5.0  # for a worker that has closed its connection to end


class WorkerFailure(Exception):
    """Raised if a call in a worker fails; the message has the kind of the error."""


# The arguments of a call: prompts, answers, columns.
Call = tuple[list[str], list[str], dict[str, list]]


class WorkerPool:
    """Worker processes that call one reward function.

    A process that takes too long is ended, and another one is started.
    """

    def __init__(self, name: str, *, num_workers: int, timeout_s: float = 0.0):
        """Start the workers.

        Args:
            name: the value of --reward_fn.
            num_workers: number of processes.
            timeout_s: seconds that a call may take; 0: no limit.
        """
        self.num_workers = num_workers
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        workers = [_Worker(name, timeout_s) for _ in range(num_workers)]
        for worker in workers:
            self._idle.put(worker)
        self._end = weakref.finalize(self, _end_all, workers)

    def run(self, calls: list[Call]) -> Iterator[Any]:
        """Yield, in order, the scores of each call or the exception that it raised."""
        yield from self._threads.map(self._run, calls)

    def close(self) -> None:
        """End the workers."""
        self._end()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, call: Call) -> Any:
        worker = self._idle.get()
        try:
            return worker.run(call)
        except (WorkerFailure, MissingColumn) as error:
            return error
        finally:
            self._idle.put(worker)


class _Worker:
    """One process; it starts at the first call, and again after it has been ended."""

    def __init__(self, name: str, timeout_s: float):
        self.name = name
        self.timeout_s = timeout_s
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def run(self, call: Call) -> Any:
        """Return the scores of a call.

        Raises:
            WorkerFailure: the function raised, took too long, or ended its process.
            MissingColumn: the data lacks a column that a grader needs.
        """
        try:
            connection = self._started()
            connection.send(call)
            if not connection.poll(self.timeout_s or None):
                self.end()
                raise WorkerFailure(
                    f"TimeoutError: no scores after {self.timeout_s:g} s (--reward_timeout_s)"
                )
            kind, value = connection.recv()
        except (EOFError, OSError) as error:
            code = self.end(grace_s=EXIT_S)
            raise WorkerFailure(f"SystemExit: its process ended with exit code {code}") from error
        if kind == "missing":
            raise MissingColumn(value)
        if kind == "error":
            raise WorkerFailure(value)
        return value

    def _started(self) -> Connection:
        """Return the connection to a process that has loaded the function."""
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "dschat.rewards.worker", self.name]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C reaches the trainer alone, which ends the workers
            )
        self._connection = Connection(ours.detach())
        if not self._connection.poll(START_S):
            self.end()
            raise WorkerFailure(f"a worker did not start in {START_S:g} s")
        self._connection.recv()
        return self._connection

    def end(self, *, grace_s: float = 0.0) -> int | None:
        """Kill the process and its children; return its exit code.

        Args:
            grace_s: seconds to wait for an end by itself.
        """
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
