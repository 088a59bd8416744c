"""Metrics: one JSON line a step, and the same numbers in TensorBoard."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from dschat.runtime import dist
from dschat.runtime.files import write_text
from dschat.runtime.log import logger

NEWLINE = b"\n"


class MetricsWriter:
    """Writes metrics on rank 0; on other ranks, and without an output folder, it does nothing.

    A number that is not finite becomes null in the file: JSON has no word for it. Lines that cannot be written (a full
    disk) are kept and tried again with the next, and the run goes on.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        tensorboard_dir: str | Path | None = None,
        resume_from: int | None = None,
    ):
        """
        Args:
            resume_from: go on with the file that is there, behind this step: later lines are cut off.
        """
        self._file = self._tensorboard = None
        self._unwritten = b""
        if not dist.is_main():
            return
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            path = Path(output_dir) / "metrics.jsonl"
            if resume_from is not None:
                _cut(path, resume_from)
            self._file = open(path, "wb" if resume_from is None else "ab", buffering=0)
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_from is None else resume_from + 1
            self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line for `step` (counted from 1; 0 is before training).

        Args:
            values: stable names to numbers.
        """
        if self._file is not None:
            clean = {key: value if math.isfinite(value) else None for key, value in values.items()}
            self._write_lines(json.dumps({"step": step, **clean}) + "\n")
        self._try_tensorboard(lambda writer: _add_scalars(writer, step, values))

    def sync(self) -> None:
        """Have all lines so far on disk, if it takes them."""
        if self._file is not None:
            self._write_lines("")
            with contextlib.suppress(OSError):  # a disk that is full has been said
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        if self._file is not None:
            self._write_lines("")
            if self._unwritten:
                logger.warning(
                    f"{self._file.name} lacks its last {self._unwritten.count(NEWLINE)} lines"
                )
            self._file.close()
        self._try_tensorboard(lambda writer: writer.close())

    def _write_lines(self, text: str) -> None:
        before, self._unwritten = self._unwritten, self._unwritten + text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not before:
                logger.warning(
                    f"{self._file.name}: {error.strerror}; its lines are kept in memory meanwhile"
                )

    def _try_tensorboard(self, action: Callable) -> None:
        if self._tensorboard is not None:
            try:
                action(self._tensorboard)
            except OSError as error:
                logger.warning(f"no more TensorBoard events: {error}")
                self._tensorboard = None


def _add_scalars(writer, step: int, values: dict[str, float]) -> None:
    for key, value in values.items():
        writer.add_scalar(key, value, global_step=step)
    writer.flush()


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to `step`; the last one may have been cut short where a run was killed."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        try:
            known = line.endswith("\n") and json.loads(line)["step"] <= step
        except ValueError:
            known = False
        if known:
            kept.append(line)
    write_text(path, "".join(kept))
