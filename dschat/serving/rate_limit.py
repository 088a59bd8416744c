"""A limit of events a minute for each sender."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

MAX_ADDRESSES = 1024  # whose events are counted
WINDOW_S = 60.0


class RateLimit:
    """At most `number` events of a key within WINDOW_S seconds."""

    def __init__(self, number: int, *, clock: Callable[[], float] = time.monotonic):
        self.number = number
        self.clock = clock
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def wait_s(self, key: str) -> float:
        """0 where an event of `key` is allowed, which then counts; else the seconds until one is."""
        with self._lock:
            now = self.clock()
            if key not in self._times and len(self._times) >= MAX_ADDRESSES:
                self._forget(now)
                if len(self._times) >= MAX_ADDRESSES:
                    return WINDOW_S
            times = self._times[key]
            while times and times[0] <= now - WINDOW_S:
                times.popleft()
            if len(times) >= self.number:
                return times[0] + WINDOW_S - now
            times.append(now)
            return 0.0

    def _forget(self, now: float) -> None:
        for key in [key for key, times in self._times.items() if times[-1] <= now - WINDOW_S]:
            del self._times[key]
