"""Metrics: one JSON line a step, and the same numbers in TensorBoard."""

import json
import math
from pathlib import Path

from dschat.tracking import dist


class MetricsWriter:
    """Writes metrics on rank 0; on other ranks, and without an output folder, it does nothing.

    A number that is not finite becomes null in the file: JSON has no word for it.
    """

    def __init__(self, output_dir: str | Path | None, *, tensorboard_dir: str | Path | None = None):
        self._file = self._tensorboard = None
        if not dist.is_main():
            return
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(output_dir) / "metrics.jsonl", "w", encoding="utf-8")
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(tensorboard_dir))

    def write(self, step: int, values: dict[str, float], *, tensorboard: dict[str, float] | None = None) -> None:
        """One line for `step` (counted from 1; 0 is before training).

        Args:
            values: stable names to numbers.
            tensorboard: further tags that go to TensorBoard alone.
        """
        if self._file is not None:
            clean = {key: value if math.isfinite(value) else None for key, value in values.items()}
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for key, value in {**values, **(tensorboard or {})}.items():
                self._tensorboard.add_scalar(key, value, global_step=step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close both files."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
