"""Alarms of step 3: what reward hacking and collapse look like in a run's metrics.

An alarm is no error: the run continues. It asks to read the answers before the score is believed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dschat.runtime import dist
from dschat.runtime.files import write_json
from dschat.runtime.log import logger

ALARMS = "alarms.json"

# The first and the last rollouts are compared, by the mean of this many. Runs of fewer than twice
# as many raise only the alarms of equal groups and of the evaluation.
WINDOW = 5
# The score counts as risen if it gained this many standard deviations of the first rollouts'
# scores: three standard errors of the difference if a rollout has 60 answers.
SCORE_RISE = 0.25
# Answers more than twice, or less than half, as long as those of the first rollouts.
LONGER = 2.0
SHORTER = 0.5
# Rise of the share of answers that were cut off: from 5% to above 25%, for example.
TRUNCATED_RISE = 0.2
# Rise of the share of 4-grams that an answer has had before: from 2% to above 12%, for example.
REPETITION_RISE = 0.1
# Fall of a judge, a reward of weight 0, in standard deviations of its first scores.
JUDGE_FALL = 0.25
# Rise of the KL, both in nats an answer and in nats a token: answers of thousands of tokens reach
# any sum. Gao et al. 2022 (Scaling laws for reward model overoptimization) measure how the true
# reward drops below the optimized one as this distance grows.
KL_RISE = 25.0
KL_TOKEN_RISE = 0.1
# Share of the first rollouts' entropy below which the policy hardly samples anything else.
ENTROPY_SHARE = 0.2
# Share of groups whose answers all score the same, and so teach nothing without a critic.
EQUAL_GROUPS = 0.95
# Fall of the last two evaluations below the best before them, in standard deviations of the first
# evaluation's scores: over two standard errors of a difference for 128 prompts. The training score
# must have risen by the second number meanwhile, in standard deviations of the first rollouts.
EVALUATION_FALL = 0.3
TRAINING_RISE = 0.1

WATCHED = (
    "objective/score",
    "objective/score_std",
    "objective/kl",
    "objective/entropy",
    "response/length_mean",
    "response/eos_rate",
    "response/repetition",
    "rollout/equal_groups",
)
# The metrics of judges are watched, too: a mean and a standard deviation for each name.
JUDGE = "judges/"
JUDGE_SPREAD = "judges_std/"


@dataclass(frozen=True)
class Alarm:
    """An alarm that a run has raised."""

    rollout: int  # after which it was raised
    name: str
    message: str  # the cause, and advice


@dataclass(frozen=True)
class _Evaluation:
    score: float
    spread: float  # standard deviation of the scores
    rollouts: int  # training scores that were known by then


class Alarms:
    """Compare a run's metrics with those of its first rollouts; raise each alarm once.

    The state depends on the metrics alone, so feeding the lines of metrics.jsonl restores it.
    """

    def __init__(self) -> None:
        """Start without any rollout."""
        self.raised: list[Alarm] = []
        self._series: dict[str, list[float]] = {name: [] for name in WATCHED}
        self._evaluations: list[_Evaluation] = []
        self._checks: dict[str, Callable[[], str]] = {
            "length": self._check_length,
            "truncated": self._check_truncated,
            "repetition": self._check_repetition,
            "kl": self._check_kl,
            "judge": self._check_judge,
            "entropy": self._check_entropy,
            "equal_groups": self._check_equal_groups,
            "evaluation": self._check_evaluation,
        }

    def update(self, rollout: int, values: Mapping[str, Any]) -> list[Alarm]:
        """Add the metrics of a rollout, and return the alarms that are new.

        Args:
            rollout: its number; 0: the evaluation before training.
            values: by metric; a value that is None or not finite counts as missing.
        """
        for name in values:
            if name.startswith((JUDGE, JUDGE_SPREAD)):
                self._series.setdefault(name, [])
        for name, series in self._series.items():
            if is_number(values.get(name)):
                series.append(values[name])
        if is_number(values.get("eval/score")) and is_number(values.get("eval/score_sd")):
            known = len(self._series["objective/score"])
            self._evaluations.append(
                _Evaluation(values["eval/score"], values["eval/score_sd"], known)
            )
        new = []
        for name, check in list(self._checks.items()):
            message = check()
            if message:
                new.append(Alarm(rollout, name, message))
                del self._checks[name]
        self.raised += new
        return new

    def _change(self, name: str) -> tuple[float, float] | None:
        """Return the means of the first and of the last rollouts, if there are enough."""
        series = self._series[name]
        if len(series) < 2 * WINDOW:
            return None
        return mean(series[:WINDOW]), mean(series[-WINDOW:])

    def _score_change(self) -> tuple[float, float] | None:
        """Return the first and the last scores if the score has risen."""
        change = self._change("objective/score")
        if change is None or change[1] - change[0] <= SCORE_RISE * self._spread():
            return None
        return change

    def _spread(self) -> float:
        """Return the standard deviation of the first rollouts' scores."""
        return mean(self._series["objective/score_std"][:WINDOW] or [0.0])

    def _check_length(self) -> str:
        score = self._score_change()
        length = self._change("response/length_mean")
        if not score or not length or SHORTER * length[0] <= length[1] <= LONGER * length[0]:
            return ""
        return (
            f"{_rise(score)} while the length of answers "
            f"went from {length[0]:.0f} to {length[1]:.0f} tokens: the reward may prefer length. "
            "Read answers (--save_rollouts), then raise --kl_coef, or let the reward ignore length."
        )

    def _check_truncated(self) -> str:
        score = self._score_change()
        ended = self._change("response/eos_rate")
        if not score or not ended or ended[0] - ended[1] <= TRUNCATED_RISE:
            return ""
        return (
            f"{_rise(score)} while the share of truncated "
            f"answers went from {1 - ended[0]:.0%} to {1 - ended[1]:.0%}. Read answers "
            "(--save_rollouts), then give --missing_eos_penalty or a larger --max_answer_seq_len."
        )

    def _check_repetition(self) -> str:
        score = self._score_change()
        repeated = self._change("response/repetition")
        if not score or not repeated or repeated[1] - repeated[0] <= REPETITION_RISE:
            return ""
        return (
            f"{_rise(score)} while the share of 4-grams "
            f"that repeat earlier ones of their answer went from {repeated[0]:.0%} to "
            f"{repeated[1]:.0%}. Read answers (--save_rollouts), then raise --kl_coef, or let the "
            "reward see repetition."
        )

    def _check_judge(self) -> str:
        score = self._score_change()
        for name in self._series:
            judge = self._change(name) if name.startswith(JUDGE) else None
            if not score or not judge:
                continue
            label = name.removeprefix(JUDGE)
            spreads = self._series[JUDGE_SPREAD + label][:WINDOW]
            if judge[0] - judge[1] > JUDGE_FALL * mean(spreads or [0.0]):
                return (
                    f"{_rise(score)} while the judge {label} "
                    f"fell from {judge[0]:.3g} to {judge[1]:.3g}: the policy may exploit the "
                    "reward. Read answers (--save_rollouts), then raise --kl_coef, or give the "
                    "judge a weight (--reward_weights)."
                )
        return ""

    def _check_kl(self) -> str:
        score = self._score_change()
        kl = self._change("objective/kl")
        length = self._change("response/length_mean")
        if not score or not kl or not length:
            return ""
        bound = max(KL_RISE, KL_TOKEN_RISE * length[1])
        if kl[1] - kl[0] <= bound:
            return ""
        return (
            f"{_rise(score)} while the KL to the reference "
            f"went from {kl[0]:.3g} to {kl[1]:.3g} nats an answer: the policy may exploit the "
            "reward. Read answers (--save_rollouts), then raise --kl_coef or set --kl_target."
        )

    def _check_entropy(self) -> str:
        entropy = self._change("objective/entropy")
        if not entropy or entropy[1] >= ENTROPY_SHARE * entropy[0]:
            return ""
        return (
            f"the entropy fell from {entropy[0]:.3g} to {entropy[1]:.3g} nats a token, so answers "
            "hardly differ. Lower --actor_learning_rate, or raise --kl_coef or --entropy_coef."
        )

    def _check_equal_groups(self) -> str:
        last = self._series["rollout/equal_groups"][-WINDOW:]
        if len(last) < WINDOW or mean(last) < EQUAL_GROUPS:
            return ""
        return (
            f"in {mean(last):.0%} of the groups all answers score the same, so hardly any prompt "
            "is learned from. Give prompts that are neither solved nor out of reach, or a reward "
            "with more values."
        )

    def _check_evaluation(self) -> str:
        if len(self._evaluations) < 3:
            return ""
        *before, second, last = self._evaluations
        best = max(before, key=lambda evaluation: evaluation.score)
        fall = best.score - max(second.score, last.score)
        if fall <= EVALUATION_FALL * self._evaluations[0].spread:
            return ""
        scores = self._series["objective/score"]
        if len(scores) < WINDOW:
            return ""
        # The evaluation before training stands beside the first rollouts.
        end = max(best.rollouts, WINDOW)
        then, now = mean(scores[:end][-WINDOW:]), mean(scores[-WINDOW:])
        if now - then <= TRAINING_RISE * self._spread():
            return ""
        return (
            f"the score of held-out prompts fell from {best.score:.3g} to {last.score:.3g} while "
            f"that of training prompts rose from {then:.3g} to {now:.3g}: the policy overfits. "
            "Stop here or train on more prompts; --save_interval keeps earlier states."
        )


class AlarmLog:
    """Log new alarms once, and keep all of a run in alarms.json; do nothing on other ranks."""

    def __init__(self, output_dir: str | Path | None, *, last: int):
        """Restore the state from metrics.jsonl in `output_dir`.

        Args:
            output_dir: folder of metrics.jsonl and alarms.json; None: keep no file.
            last: the rollout that the run continues after; later lines are ignored.
        """
        self._alarms = Alarms()
        self._path = None
        if output_dir is None or not dist.is_main():
            return
        self._path = Path(output_dir) / ALARMS
        for step, values in _metrics(Path(output_dir) / "metrics.jsonl"):
            if step <= last:
                self._alarms.update(step, values)
        self._path.unlink(missing_ok=True)  # of an earlier run, or of rollouts that are repeated
        if self._alarms.raised:
            self._write()

    def update(self, rollout: int, values: Mapping[str, Any]) -> None:
        """Log the alarms that the metrics of `rollout` raise."""
        if not dist.is_main():
            return
        new = self._alarms.update(rollout, values)
        for alarm in new:
            logger.warning(f"alarm after rollout {rollout}: {alarm.message}")
        if new and self._path is not None:
            self._write()

    def _write(self) -> None:
        try:
            write_json(self._path, [asdict(alarm) for alarm in self._alarms.raised])
        except OSError as error:  # a full disk must not end the run
            logger.warning(f"{self._path}: {error.strerror}; report.html will lack this alarm")


def is_number(value: Any) -> bool:
    """Return whether a metric has a value that is finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def mean(values: list[float]) -> float:
    """Return the mean of one or more numbers."""
    return sum(values) / len(values)


def _rise(score: tuple[float, float]) -> str:
    return f"the score rose from {score[0]:.3g} to {score[1]:.3g}"


def _metrics(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the step and the values of each line of metrics.jsonl; [] if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a full disk
            continue
        found.append((row["step"], row))
    return found
