"""Requests to stop (SIGTERM, SIGINT), and a watch for ranks of this host that have ended."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch

from dschat.runtime import dist
from dschat.runtime.grace import launcher_hint

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal sends SIGINT to the launcher and to its ranks, and the launcher forwards it: a rank
# receives it twice.
REPEATED_WITHIN_S = 1.0
WATCH_INTERVAL_S = 2.0
# Usually a rank that fails reports why, and the launcher ends the others. After this time without
# that, they end themselves.
GRACE_S = 15.0


class Interruption:
    """A context in which a first signal is noted, and a second SIGINT interrupts at once.

    The second SIGINT has to come a moment after the first. If no error ends the context, signals
    are handled the same way after it, until ``release``: the model still has to be saved.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._over = False

    def __enter__(self) -> "Interruption":
        """Handle signals from now on."""
        if threading.current_thread() is threading.main_thread():
            release_signals()
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Note that training is over; after an error, restore the signal handlers too."""
        self._over = True
        if kind is not None:
            self.release()

    def release(self) -> None:
        """Restore the signal handlers from before the context."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> int:
        """Return the number of a signal that any rank received, else 0. All ranks must call it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return int(dist.all_reduce(torch.tensor(self._signal, device=device), "max"))

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal == 0:
            self._signal = number
            self._when = now
            name = signal.Signals(number).name
            if self._over:
                outcome = "the model is being saved; the run ends after that"
            else:
                outcome = f"the run will stop after this step{launcher_hint()}"
            # Not through logging: the handler may run in the middle of another message.
            _write_stderr(f"\nReceived {name}: {outcome} (rank {dist.rank()})\n")
        elif number == signal.SIGINT and now - self._when > REPEATED_WITHIN_S:
            raise KeyboardInterrupt


def release_signals() -> None:
    """Restore the signal handlers from before the last context, which may still handle signals."""
    last = getattr(signal.getsignal(SIGNALS[0]), "__self__", None)  # its handler is a method
    if isinstance(last, Interruption):
        last.release()


class PeerWatch:
    """A context that ends this rank, with a message, soon after another rank of the host ended.

    Otherwise a collective could wait for the dead rank indefinitely. It waits in C++, where Python
    does not handle signals.
    """

    def __enter__(self) -> "PeerWatch":
        """Start watching in a thread."""
        self._done = threading.Event()
        # Only the ranks of the same launcher: their process ids are valid here.
        place = f"{socket.gethostname()}/{os.getppid()}"
        found = [text.split() for text in dist.gather_texts(f"{place} {os.getpid()}")]
        self._peers = {rank: int(pid) for rank, (other, pid) in enumerate(found) if other == place}
        del self._peers[dist.rank()]
        if self._peers:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_INTERVAL_S):
            gone = [rank for rank, pid in self._peers.items() if not _alive(pid)]
            if gone and not self._done.wait(GRACE_S):
                _write_stderr(
                    f"\nerror (rank {dist.rank()}): the process of rank {gone[0]} has ended, "
                    "so this rank ends too\n"
                )
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(1)


def _write_stderr(text: str) -> None:
    # The reader of stderr may have ended by the same signal; the run must not fail because of that.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not os.path.exists("/proc/self/stat")  # without /proc, assume that it is alive
