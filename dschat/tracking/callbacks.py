"""Callbacks: what a user's code does at an update, a rollout, an evaluation or a save."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.runtime import dist


class Callback:
    """Methods that a run calls; a subclass overrides those that it needs.

    Rank 0 alone calls them, unless `every_rank` is true. An exception ends the run.
    """

    every_rank = False

    def on_update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Act after an update (step 3: after all updates of a rollout).

        Args:
            step: its number, from 1.
            metrics: as in the line of metrics.jsonl.
        """

    def on_rollout(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Act after the answers of a rollout are scored and before they are learned from.

        Args:
            step: the number of the rollout, from 1.
            rows: one for each answer of all ranks, as --save_rollouts writes them: prompt, answer,
                score, reward, advantage, length, ...
        """

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Act after an evaluation.

        Args:
            step: updates (step 3: rollouts) before it; 0: the evaluation before training.
            metrics: those of the evaluation, whose names begin with eval/.
        """

    def on_save(self, folder: Path) -> None:
        """Act after a checkpoint or the finished models are saved.

        Args:
            folder: of the checkpoint, or the output folder.
        """


class Callbacks:
    """Several callbacks as one."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        """Set the callbacks, which are called in this order."""
        self._all = list(callbacks)

    @property
    def read_rollouts(self) -> bool:
        """Whether any of them overrides ``on_rollout``, on whatever rank."""
        return any(type(one).on_rollout is not Callback.on_rollout for one in self._all)

    def on_update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call ``on_update`` of all."""
        for one in self._here:
            one.on_update(step, metrics)

    def on_rollout(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Call ``on_rollout`` of all."""
        for one in self._here:
            one.on_rollout(step, rows)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call ``on_evaluate`` of all with the metrics of an evaluation; do nothing without any."""
        found = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if found:
            for one in self._here:
                one.on_evaluate(step, found)

    def on_save(self, folder: Path) -> None:
        """Call ``on_save`` of all."""
        for one in self._here:
            one.on_save(folder)

    @property
    def _here(self) -> list[Callback]:
        """The callbacks that this rank calls."""
        return [one for one in self._all if one.every_rank or dist.is_main()]
