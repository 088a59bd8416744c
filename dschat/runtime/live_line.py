"""A line at the bottom of a terminal that the next one replaces; other output appears above it."""

import logging
import sys
from typing import TextIO

from tqdm import tqdm

INTERVAL_S = 0.5  # seconds between two versions of the line


def has_terminal(stream: TextIO | None = None) -> bool:
    """Return whether `stream` (default: stdout) is a terminal."""
    stream = sys.stdout if stream is None else stream
    return bool(stream.isatty())


class LiveLine:
    """The live line of a terminal, cut to its width."""

    def __init__(self, stream: TextIO):
        """Set the terminal."""
        self._stream = stream
        self._bar: tqdm | None = None

    def show(self, text: str) -> None:
        """Show `text` as the live line."""
        if self._bar is None:
            self._bar = tqdm(
                total=0,
                bar_format="{desc}",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
                mininterval=0,
            )
        self._bar.set_description_str(text)

    def write(self, text: str) -> None:
        """Print `text` above the live line, to stay."""
        tqdm.write(text, file=self._stream)

    def clear(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TerminalHandler(logging.Handler):
    """Print messages to a terminal; one that is logged with ``extra=LIVE`` is a live line."""

    def __init__(self, stream: TextIO):
        """Set the terminal."""
        super().__init__()
        self._line = LiveLine(stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        try:
            text = self.format(record)
            if getattr(record, "live", False):
                self._line.show(text)
            else:
                self._line.write(text)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Remove the live line."""
        self._line.clear()
        super().close()


LIVE = {"live": True}
