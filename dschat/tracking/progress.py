"""The progress line of a run."""

import time

import torch

from dschat.runtime import dist
from dschat.runtime.log import logger


class Progress:
    """Prints a line every `interval_s` seconds, and at the first and the last step, on rank 0.

    ``SFT  step 12/40  30%  loss 3.912  1,024 tok/s  mem 3.1/24.0 GiB  left 0:43``
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
        self.interval_s = interval_s
        self.done = done
        self._start = time.monotonic()
        self._last = -float("inf")

    def update(self, step: int, fields: dict[str, str]) -> None:
        """Report step `step` of `total` (counted from 1) as done; `fields` are part of the line."""
        now = time.monotonic()
        if not dist.is_main() or (now - self._last < self.interval_s and step != self.total):
            return
        self._last = now
        left = (now - self._start) / max(step - self.done, 1) * (self.total - step)
        parts = [f"{self.name}  step {step}/{self.total}  {100 * step // max(self.total, 1)}%"]
        parts += [f"{key} {value}" for key, value in fields.items()]
        parts += [f"mem {memory_text()}", f"left {clock(left)}"]
        logger.info("  ".join(parts))


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
