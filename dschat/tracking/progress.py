"""The progress line of a run."""

import contextlib
import time
from collections.abc import Iterator

import torch

from dschat.runtime import activity, dist
from dschat.runtime.live_line import INTERVAL_S, LIVE, has_terminal
from dschat.runtime.log import logger


class Progress:
    """Prints a line every `interval_s` seconds, and at the first and the last step, on rank 0.

    ``SFT  step 12/40  30%  loss 3.912  1,024 tok/s  mem 3.1/24.0 GiB  left 0:43``

    On a terminal the line is live: each replaces the one before, twice a second. The last stays.
    """

    def __init__(self, name: str, total: int, *, interval_s: float = 5.0, done: int = 0):
        """Start the clock.

        Args:
            name: what the line begins with.
            total: number of steps.
            interval_s: seconds between two lines.
            done: steps taken before the run was resumed.
        """
        self.name = name
        self.total = total
        self.done = done
        self._pace = _Pace(interval_s)

    def update(self, step: int, fields: dict[str, str]) -> None:
        """Report step `step` of `total` (counted from 1) as done; `fields` are part of the line."""
        if not dist.is_main() or not (self._pace.is_due() or step == self.total):
            return
        left = self._pace.seconds() / max(step - self.done, 1) * (self.total - step)
        parts = [f"{self.name}  step {step}/{self.total}  {100 * step // max(self.total, 1)}%"]
        parts += [f"{key} {value}" for key, value in fields.items()]
        parts += [f"mem {memory_text()}", f"left {clock(left)}"]
        self._pace.log("  ".join(parts), stays=step == self.total)


class ReportedBatches:
    """Batches of a loader; while they are read, rank 0 prints a line every `interval_s` seconds.

    ``SFT  evaluation  batch 3/12  25%  mem 3.1/24.0 GiB  left 0:43``

    On a terminal the line is live, as of ``Progress``.
    """

    def __init__(self, loader, name: str, *, interval_s: float = 5.0):
        """Set the loader, what the line begins with, and the seconds between two lines."""
        self.loader = loader
        self.name = name
        self.interval_s = interval_s

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        pace = _Pace(self.interval_s)
        pace.is_due()  # the first line comes after the first interval
        for done, batch in enumerate(self.loader):
            if done and dist.is_main() and pace.is_due():
                left = pace.seconds() / done * (len(self) - done)
                pace.log(
                    f"{self.name}  batch {done}/{len(self)}  {100 * done // len(self)}%  "
                    f"mem {memory_text()}  left {clock(left)}"
                )
            yield batch


@contextlib.contextmanager
def reported_work(name: str, *, interval_s: float = 5.0) -> Iterator[None]:
    """Show what the work in this block gives to ``activity.report``, on rank 0.

    ``PPO  rollout 3  batch 2/4  answers 12/64  token 130/512  mem 3.1/24.0 GiB  0:42 so far``

    On a terminal the line is live. Elsewhere each line comes after twice the time of the one before
    it, so that long work prints few.

    Args:
        name: what the line begins with.
        interval_s: seconds before the first line.
    """
    if not dist.is_main():
        yield
        return
    pace = _Pace(interval_s)
    due_s = max(interval_s, 1.0)

    def show(**counts: tuple[int, int]) -> None:
        nonlocal due_s
        seconds = pace.seconds()
        if seconds < due_s:
            return
        due_s = seconds + INTERVAL_S if pace.live else 2 * seconds
        parts = [name, *(f"{key} {done}/{total}" for key, (done, total) in counts.items())]
        pace.log("  ".join([*parts, f"mem {memory_text()}", f"{clock(seconds)} so far"]))

    with activity.watched(show):
        yield


class _Pace:
    """The schedule of progress lines, and their display."""

    def __init__(self, interval_s: float):
        self.live = has_terminal()
        self._interval_s = min(interval_s, INTERVAL_S) if self.live else interval_s
        self._start = time.monotonic()
        self._last = -float("inf")

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def is_due(self) -> bool:
        """Return whether a line is due; if so, the next is due after the interval."""
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return False
        self._last = now
        return True

    def log(self, text: str, *, stays: bool = False) -> None:
        """Log a line: on a terminal as the live line, unless it stays."""
        logger.info(text, extra=LIVE if self.live and not stays else None)


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def memory_gib() -> tuple[float, float]:
    """Return memory used and total memory, in GiB.

    On a GPU, used is the peak of reserved memory; on a CPU, the memory of this process on the host.
    """
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_reserved()
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        import psutil

        used = psutil.Process().memory_info().rss
        total = psutil.virtual_memory().total
    return used / 2**30, total / 2**30


def memory_text() -> str:
    """Format memory as ``used/total GiB``."""
    used, total = memory_gib()
    return f"{used:.1f}/{total:.1f} GiB"
