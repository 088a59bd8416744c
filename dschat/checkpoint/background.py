"""Checkpoints that a thread writes while training continues."""

import threading
from collections.abc import Callable

from dschat.engine.host_memory import HostMemory
from dschat.runtime import dist
from dschat.runtime.log import logger


class BackgroundSaves:
    """Writes one checkpoint at a time in a thread.

    The ranks' threads agree over a separate process group, so that their messages do not mix with
    those of training.
    """

    def __init__(self) -> None:
        """Make the process group. Every rank must call it."""
        self.memory = HostMemory()
        self.group = dist.new_cpu_group()
        self._thread: threading.Thread | None = None
        self._saved = False

    def start(self, write: Callable[[], bool]) -> None:
        """Call ``write()`` in the thread, after the last save is over."""
        self.wait()

        def run() -> None:
            try:
                self._saved = write()
            except Exception as error:
                # Messages between the ranks fail if one of them has ended.
                logger.warning(f"A checkpoint was not saved ({type(error).__name__}: {error}).")

        self._saved = False
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_writing(self) -> bool:
        """Return whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the save that is running.

        Args:
            timeout_s: seconds to wait at most; None: to its end.

        Returns:
            True if a save was running and the checkpoint is complete.
        """
        if self._thread is None:
            return False
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._thread = None
        return self._saved
