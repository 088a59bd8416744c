"""A limit on the events per minute of each sender."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

MAX_ADDRESSES = 1024  # senders whose events are counted at the same time
WINDOW_S = 60.0


class RateLimit:
    """A limit of `number` events of a key within WINDOW_S seconds."""

    def __init__(self, number: int, *, clock: Callable[[], float] = time.monotonic):
        self.number = number
        self.clock = clock
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def wait_s(self, key: str) -> float:
        """Count an event of `key` and return 0 if it is allowed; else return the seconds to wait.

        If too many keys are counted already, an event of a new key is not allowed.
        """
        with self._lock:
            now = self.clock()
            if key not in self._times and len(self._times) >= MAX_ADDRESSES:
                self._drop_old_keys(now)
                if len(self._times) >= MAX_ADDRESSES:
                    return WINDOW_S
            times = self._times[key]
            while times and times[0] <= now - WINDOW_S:
                times.popleft()
            if len(times) >= self.number:
                return times[0] + WINDOW_S - now
            times.append(now)
            return 0.0

    def _drop_old_keys(self, now: float) -> None:
        """Remove the keys that have no event within the window."""
        old = [key for key, times in self._times.items() if times[-1] <= now - WINDOW_S]
        for key in old:
            del self._times[key]
