"""The files that a run leaves in its output folder, read for a report."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.runtime.run_record import RECORD

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
ALARMS = "alarms.json"
# The folders of the steps in an output folder of e2e_rlhf.py, in the order of the steps.
STEP_PATTERNS = ("actor-models/*", "reward-models/*", "step3-models/*")

Curve = list[tuple[float, float]]  # update or rollout, and value


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, with the reward's score if it is known."""

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, and answers to it by model name, in the order of training."""

    text: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Run:
    """The files of a run of one step, as far as they can be read.

    Attributes:
        folder: the output folder.
        record: run.json; empty if it cannot be read.
        curves: the points of each metric. A value that was not finite has no point.
        prompts: held-out prompts of step 3.
        margins: differences of score between chosen and rejected answers, by "before" and "after".
        alarms: rollout and message of each alarm of step 3.
    """

    folder: Path
    record: dict[str, Any]
    curves: dict[str, Curve]
    prompts: list[Prompt] = field(default_factory=list)
    margins: dict[str, list[float]] = field(default_factory=dict)
    alarms: list[tuple[int, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name of the step, such as "Step 2, reward model"."""
        return str(self.record.get("step") or self.folder.name)

    @property
    def unit(self) -> str:
        """The word for what the run counts."""
        return "rollout" if "rollouts" in self.record or self.prompts else "update"


def is_run(folder: Path) -> bool:
    """Return whether a run of a step has written its metrics to `folder`."""
    return (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Read the output folder of a step.

    Raises:
        ValueError: the folder holds no metrics.
    """
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no {METRICS}. Give the --output_dir of a step, or the --output-dir of "
            "e2e_rlhf.py."
        )
    return Run(
        folder=folder,
        record=_read_object(folder / RECORD),
        curves=_read_curves(folder / METRICS),
        prompts=_read_prompts(folder / "evaluation"),
        margins=_read_margins(folder / "evaluation"),
        alarms=_read_alarms(folder / ALARMS),
    )


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of the steps in an output folder of e2e_rlhf.py, in order."""
    found = []
    for pattern in STEP_PATTERNS:
        found += [path for path in sorted(folder.glob(pattern)) if is_run(path)]
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """Return summary.json of e2e_rlhf.py; empty if there is none."""
    return _read_object(folder / SUMMARY)


def summary_prompts(summary: dict[str, Any]) -> list[Prompt]:
    """Return the sample prompts of a summary, with the answers of base, SFT and RLHF."""
    found = []
    for sample in summary.get("samples") or []:
        answers = {name: Answer(text) for name, text in sample.items() if name != "prompt"}
        found.append(Prompt(sample["prompt"], answers))
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; a last line that is incomplete is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _read_curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in _read_lines(path):
        step = line.pop("step", None)
        if not isinstance(step, int):
            continue
        for key, value in line.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(key, []).append((step, float(value)))
    return curves


def _read_prompts(folder: Path) -> list[Prompt]:
    """Return the held-out prompts with the answers of the first and the last evaluation."""
    files = sorted(folder.glob("rollout_*.jsonl"))
    if len(files) < 2:
        return []
    before = _read_lines(files[0])
    after = _read_lines(files[-1])
    return [
        Prompt(
            old["prompt"],
            {
                "sft": Answer(old["answer"], old.get("score")),
                "rlhf": Answer(new["answer"], new.get("score")),
            },
        )
        for old, new in zip(before, after, strict=False)
        if old["prompt"] == new["prompt"]
    ]


def _read_margins(folder: Path) -> dict[str, list[float]]:
    """Return the margins of the first and the last evaluation of a run on pairs."""
    files = sorted(folder.glob("margins_*.json"))
    found = {}
    for name, file in zip(
        ("before", "after"), (files[:1] + files[-1:])[: len(files)], strict=False
    ):
        margins = _read_object(file).get("margins")
        if isinstance(margins, list):
            found[name] = [float(value) for value in margins]
    return found


def _read_alarms(path: Path) -> list[tuple[int, str]]:
    """Return the alarms that step 3 has written; none if they cannot be read."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(int(row["rollout"]), str(row["message"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []
