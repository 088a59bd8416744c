"""The table and the figure of reproduce_verifiable.py, from its lines of results.jsonl."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

TITLES = {
    "ppo": "PPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "dapo": "DAPO",
    "gspo": "GSPO",
}
GOAL = 0.8  # the accuracy that rollouts and seconds are counted to
BAR = 3.0  # standard errors that a gain must have
CLOSE = 2.0  # standard errors of a difference that is called no difference
HEADER = (
    "recipe",
    "accuracy before",
    "accuracy after",
    "gain in standard errors",
    "sums",
    "word problems",
    "rollouts to 80%",
    "seconds to 80%",
    "KL, nats",
    "tokens",
    "seconds a rollout: sample + score + train",
)
PANELS = {"accuracy": "accuracy", "kl": "KL, nats an answer", "length": "answer length, tokens"}


@dataclass(frozen=True)
class Outcome:
    """The results of a recipe, over its seeds."""

    recipe: str
    seeds: int
    before: float  # mean accuracy
    after: float
    error: float  # standard error of the accuracy after
    gain_error: float  # standard error of the gain

    @property
    def gain(self) -> float:
        """The gain of accuracy."""
        return self.after - self.before

    @property
    def meets_bar(self) -> bool:
        """Whether the gain is at least `BAR` standard errors."""
        return self.gain > 0 and self.gain >= BAR * self.gain_error


def right_answers(line: dict, when: str, kind: str = "") -> list[int]:
    """Return 1 for each right answer and 0 for each wrong one; see `reproduce_verifiable.outcome`.

    Args:
        line: of results.jsonl.
        when: "before" or "after".
        kind: the kind of problem; "": all.
    """
    kinds = [kind] if kind else sorted(line[when])
    return [int(digit) for name in kinds for digit in line[when].get(name, "")]


def standard_error(by_seed: list[list[float]]) -> float:
    """Return the standard error of the mean of values [seeds, problems].

    It is the larger of two: over the problems, of their means over the seeds; and over the seeds,
    if there are several, of their means over the problems. All seeds have the same problems.
    """
    problems = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    found = [0.0]
    for values in (problems, [statistics.fmean(values) for values in by_seed]):
        if len(values) > 1:
            found.append(statistics.stdev(values) / math.sqrt(len(values)))
    return max(found)


def outcome_of(recipe: str, lines: list[dict]) -> Outcome:
    """Return the outcome of the lines of one recipe."""
    before = [right_answers(line, "before") for line in lines]
    after = [right_answers(line, "after") for line in lines]
    gains = [
        [b - a for a, b in zip(old, new, strict=True)]
        for old, new in zip(before, after, strict=True)
    ]
    return Outcome(
        recipe=recipe,
        seeds=len(lines),
        before=statistics.fmean(map(statistics.fmean, before)),
        after=statistics.fmean(map(statistics.fmean, after)),
        error=standard_error(after),
        gain_error=standard_error(gains),
    )


def by_recipe(lines: list[dict]) -> dict[str, list[dict]]:
    """Return the lines of each recipe."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line["recipe"], []).append(line)
    return found


def missed_bars(lines: list[dict]) -> list[str]:
    """Return the recipes whose gain is below `BAR` standard errors."""
    return [
        recipe
        for recipe, found in by_recipe(lines).items()
        if not outcome_of(recipe, found).meets_bar
    ]


def cost_of_goal(lines: list[dict], key: str) -> str:
    """Return the mean of curve[`key`] at the first evaluation of at least `GOAL`, as text.

    If only some of the seeds reach it, the mean is theirs, and the text says how many they are.
    """
    reached = []
    for line in lines:
        points = [point[key] for point in line["curve"] if point["accuracy"] >= GOAL]
        reached += points[:1]
    if not reached:
        return "not reached"
    text = f"{statistics.fmean(reached):.0f}"
    return text if len(reached) == len(lines) else f"{text} ({len(reached)} of {len(lines)} seeds)"


def report(lines: list[dict]) -> str:
    """Return the table in Markdown, the recipes by accuracy, and who wins."""
    groups = by_recipe(lines)
    outcomes = [outcome_of(recipe, found) for recipe, found in groups.items()]
    outcomes.sort(key=lambda outcome: -outcome.after)
    rows = [HEADER, *(_row(outcome, groups[outcome.recipe]) for outcome in outcomes)]
    header, *others = ("| " + " | ".join(row) + " |" for row in rows)
    text = "\n".join([header, "|-" * len(HEADER) + "|", *others])
    return f"{text}\n\n{_verdict(outcomes)}\n{_conditions(lines)}\n"


def _row(outcome: Outcome, lines: list[dict]) -> tuple[str, ...]:
    last = [line["curve"][-1] for line in lines]
    split = [
        f"{statistics.fmean(line['split'][part] for line in lines):.2f}"
        for part in ("generate", "score", "train")
    ]
    return (
        TITLES[outcome.recipe],
        _percent(outcome.before),
        f"{_percent(outcome.after)} ± {100 * outcome.error:.1f}",
        f"{outcome.gain / outcome.gain_error:.1f}" if outcome.gain_error else "",
        _accuracy(lines, "sum"),
        _accuracy(lines, "word"),
        cost_of_goal(lines, "sampled_rollouts"),
        cost_of_goal(lines, "seconds"),
        f"{statistics.fmean(point['kl'] for point in last):.2f}",
        f"{statistics.fmean(point['length'] for point in last):.1f}",
        " + ".join(split),
    )


def _accuracy(lines: list[dict], kind: str) -> str:
    right = [digit for line in lines for digit in right_answers(line, "after", kind)]
    return _percent(statistics.fmean(right)) if right else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _verdict(outcomes: list[Outcome]) -> str:
    """Return who has the highest accuracy, and who is not clearly below."""
    best, *others = outcomes
    close = [
        TITLES[other.recipe]
        for other in others
        if best.after - other.after <= CLOSE * math.hypot(best.error, other.error)
    ]
    text = f"{TITLES[best.recipe]} has the highest accuracy."
    if close:
        return f"{text} Within {CLOSE:.0f} standard errors of it: {', '.join(close)}."
    return f"{text} All others are more than {CLOSE:.0f} standard errors below." if others else text


def _conditions(lines: list[dict]) -> str:
    """Return the seeds, problems, hardware and versions, as one line for each of them."""
    seeds = sorted({line["seed"] for line in lines})
    problems = len(right_answers(lines[0], "after"))
    text = f"Seeds {', '.join(map(str, seeds))}; {problems} held-out problems, one sampled answer."
    machines = []
    for line in lines:
        hardware, versions = line["hardware"], line["versions"]
        name = hardware.get("gpu", f"{hardware['cpu']}, {hardware['cpu_cores']} cores")
        packages = ", ".join(
            f"{package} {versions[package]}" for package in ("torch", "transformers", "deepspeed")
        )
        machine = f"{name} ({packages}); runs at a time: {line['parallel']}."
        if machine not in machines:
            machines.append(machine)
    return "\n".join([text, *machines])


def draw(lines: list[dict], file: Path) -> None:
    """Draw accuracy, KL and length over the rollouts: means over the seeds, and their range."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib, --report_only)")
        return
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 4))
    for recipe, found in by_recipe(lines).items():
        for axis, key in zip(axes, PANELS, strict=True):
            rollouts, means, lowest, highest = _band(found, key)
            axis.plot(rollouts, means, label=TITLES[recipe])
            axis.fill_between(rollouts, lowest, highest, alpha=0.15)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(xlabel="rollouts", title=title)
    axes[0].axhline(GOAL, color="gray", linestyle=":")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _band(lines: list[dict], key: str) -> tuple[list, list[float], list[float], list[float]]:
    """Return the rollouts, and mean, lowest and highest value of the seeds at each."""
    values: dict[int, list[float]] = {}
    for line in lines:
        for point in line["curve"]:
            values.setdefault(point["rollout"], []).append(point[key])
    rollouts = sorted(values)
    columns = [values[rollout] for rollout in rollouts]
    means = [statistics.fmean(column) for column in columns]
    return rollouts, means, [min(column) for column in columns], [max(column) for column in columns]
