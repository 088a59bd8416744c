"""Metrics: one JSON line per step, and the same numbers in further loggers."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.runtime import dist
from dschat.runtime.files import write_text
from dschat.runtime.log import logger
from dschat.tracking.loggers import Logger, Loggers

NEWLINE = b"\n"


class MetricsWriter:
    """Write metrics.jsonl, and the same to loggers; do nothing on ranks other than 0.

    A number that is not finite is null in the file: JSON has no other word for it. If lines cannot
    be written (a full disk), they are kept and written with the next ones; the run continues.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        loggers: Sequence[Logger] = (),
        resume_from: int | None = None,
    ):
        """Open the files.

        Args:
            output_dir: folder of metrics.jsonl; None: no such file.
            loggers: from ``open_loggers``.
            resume_from: continue the existing file after this step; later lines are cut off.
        """
        self._file = None
        self._loggers = Loggers(loggers)
        self._unwritten = b""
        if not dist.is_main():
            return
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            path = Path(output_dir) / "metrics.jsonl"
            if resume_from is not None:
                _truncate(path, resume_from)
            self._file = open(path, "wb" if resume_from is None else "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step.

        Args:
            step: counted from 1; 0 is before training.
            values: the number of each metric.
        """
        if self._file is not None:
            clean = {key: value if math.isfinite(value) else None for key, value in values.items()}
            self._write_lines(json.dumps({"step": step, **clean}) + "\n")
        self._loggers.write(step, values)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled answers to the loggers that have tables or texts."""
        self._loggers.write_samples(step, rows)

    def sync(self) -> None:
        """Flush all lines to disk, if there is room for them."""
        if self._file is not None:
            self._write_lines("")
            with contextlib.suppress(OSError):  # a full disk has been reported
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the loggers."""
        if self._file is not None:
            self._write_lines("")
            if self._unwritten:
                logger.warning(
                    f"{self._file.name} lacks its last {self._unwritten.count(NEWLINE)} lines"
                )
            self._file.close()
        self._loggers.close()

    def _write_lines(self, text: str) -> None:
        before = self._unwritten
        self._unwritten = before + text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not before:
                logger.warning(
                    f"{self._file.name}: {error.strerror}; lines are kept in memory until they "
                    "can be written"
                )


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; drop a last one that is incomplete because a run was killed."""
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            known = line.endswith("\n") and json.loads(line)["step"] <= step
        except ValueError:
            known = False
        if known:
            kept.append(line)
    write_text(path, "".join(kept))
