"""Requests to stop (SIGTERM, SIGINT), answered between two steps; and a watch over the other processes of this host."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import torch

from dschat.runtime import dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass the first signal on again, and a terminal sends it to them and to us alike.
REPEATED_WITHIN_S = 1.0
WATCH_INTERVAL_S = 2.0
# A process that fails says why, and the launcher ends the others; only where that does not happen they end themselves.
GRACE_S = 15.0


_kept: "Interruption | None" = None  # the last one whose signals were taken


class Interruption:
    """Inside the context a first signal is noted, and a second SIGINT, a moment later, interrupts at once.

    Behind it, too, where no error ended it, until ``release``: what is left then is to save the model, and that is not
    to be lost either.
    """

    def __init__(self):
        self._signal, self._when, self._before, self._over = 0, 0.0, {}, False

    def __enter__(self) -> "Interruption":
        global _kept
        if threading.current_thread() is threading.main_thread():
            if _kept is not None:
                _kept.release()
            _kept = self
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, *_) -> None:
        self._over = True
        if kind is not None:
            self.release()

    def release(self) -> None:
        """Signals act again as they did before the context."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> int:
        """The number of the signal that any process got, 0 where none did. Every process must call it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return int(dist.all_reduce(torch.tensor(self._signal, device=device), "max"))

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signal == 0:
            self._signal, self._when = number, now
            name = signal.Signals(number).name
            # Not through logging: a handler may come in the middle of another message.
            what = (
                "the model is being saved, and the run ends behind that"
                if self._over
                else "will stop behind this step"
            )
            _say(f"\n{name}: {what} (rank {dist.rank()})\n")
        elif number == signal.SIGINT and now - self._when > REPEATED_WITHIN_S:
            raise KeyboardInterrupt


class PeerWatch:
    """Ends this process, with a message, some seconds after another one of this host has ended inside the context.

    A collective that waits for a dead process may wait for ever, in C++, where no signal is heard.
    """

    def __enter__(self) -> "PeerWatch":
        self._done = threading.Event()
        # Those that one launcher started, whose process ids mean the same here.
        place = f"{socket.gethostname()}/{os.getppid()}"
        found = [text.split() for text in dist.gather_texts(f"{place} {os.getpid()}")]
        self._peers = {rank: int(pid) for rank, (other, pid) in enumerate(found) if other == place}
        del self._peers[dist.rank()]
        if self._peers:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_INTERVAL_S):
            gone = [rank for rank, pid in self._peers.items() if not _alive(pid)]
            if gone and not self._done.wait(GRACE_S):
                _say(
                    f"\nerror (rank {dist.rank()}): the process of rank {gone[0]} has ended; so this one ends too\n"
                )
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(1)


def _say(text: str) -> None:
    # What reads the screen may have ended by the same signal, and the run is not to end by that.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not os.path.exists("/proc/self/stat")  # without /proc nothing can be told
