"""Metrics: one JSON line a step, and the same numbers in TensorBoard."""

import json
import math
import os
from pathlib import Path

from dschat.tracking import dist
from dschat.tracking.report import write_text


class MetricsWriter:
    """Writes metrics on rank 0; on other ranks, and without an output folder, it does nothing.

    A number that is not finite becomes null in the file: JSON has no word for it.
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
        if not dist.is_main():
            return
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            path = Path(output_dir) / "metrics.jsonl"
            if resume_from is not None:
                _cut(path, resume_from)
            self._file = open(path, "w" if resume_from is None else "a", encoding="utf-8")
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
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, global_step=step)
            self._tensorboard.flush()

    def sync(self) -> None:
        """Have all lines so far on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()


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
