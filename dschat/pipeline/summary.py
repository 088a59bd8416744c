"""The results of a finished pipeline, read from the files that its steps wrote."""

import json
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dschat.tracking.table import table

BOOTSTRAP_RESAMPLES = 10_000


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the objects of a JSON Lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def paired_lower_bound(before: list[float], after: list[float], *, seed: int = 0) -> float:
    """Return the lower end of the 95% interval of mean(after - before).

    Paired percentile bootstrap over the rows (Efron 1979): the 2.5th percentile of 10,000
    resamples.
    """
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    picks = np.random.RandomState(seed).randint(
        0, len(gains), size=(BOOTSTRAP_RESAMPLES, len(gains))
    )
    return float(np.percentile(gains[picks].mean(axis=1), 2.5))


def before_and_after(folder: str | Path, metric: str) -> tuple[float, float]:
    """Return the first and the last value of `metric` in folder/metrics.jsonl."""
    found = [line[metric] for line in read_jsonl(Path(folder) / "metrics.jsonl") if metric in line]
    return found[0], found[-1]


def supervised_section(folder: str | Path, metric: str, name: str) -> dict[str, float]:
    """Return ``{name}_before`` and ``{name}_after`` for the output folder of step 1 or 2."""
    before, after = before_and_after(folder, metric)
    return {f"{name}_before": before, f"{name}_after": after}


def ppo_section(
    folder: str | Path, *, judge: Callable[[str], float] | None = None
) -> dict[str, float]:
    """Return scores, KL and lengths before and after step 3, on the same held-out prompts.

    Args:
        folder: the output folder of step 3.
        judge: maps prompt and answer, as one text, to a number. If given, its mean before and
            after is part of the section.
    """
    files = sorted((Path(folder) / "evaluation").glob("rollout_*.jsonl"))
    before, after = read_jsonl(files[0]), read_jsonl(files[-1])
    scores = [[row["score"] for row in rows] for rows in (before, after)]
    spread = float(np.std(scores[0], ddof=1))
    gain = float(np.mean(scores[1]) - np.mean(scores[0]))
    section = {
        "prompts": len(before),
        "score_before": float(np.mean(scores[0])),
        "score_after": float(np.mean(scores[1])),
        "score_sd_before": spread,
        "score_gain_sd": gain / spread,
        "score_gain_lower95": paired_lower_bound(*scores),
        "kl": float(np.mean([row["kl"] for row in after])),
        "length_before": float(np.mean([row["length"] for row in before])),
        "length_after": float(np.mean([row["length"] for row in after])),
        "eos_rate_before": float(np.mean([row["ended"] for row in before])),
        "eos_rate_after": float(np.mean([row["ended"] for row in after])),
    }
    if judge is not None:
        opinions = [
            [judge(row["prompt"].partition(": ")[2] + row["answer"]) for row in rows]
            for rows in (before, after)
        ]
        section |= {
            "judge_before": float(np.mean(opinions[0])),
            "judge_after": float(np.mean(opinions[1])),
            "judge_gain_lower95": paired_lower_bound(*opinions),
        }
    return section


def summary_text(summary: dict) -> str:
    """Format the summary: a table, sample prompts with their answers, and the seconds per part."""
    sft, reward, ppo = summary["sft"], summary["reward"], summary["ppo"]
    rows = [
        [
            "SFT: held-out perplexity",
            f"{sft['perplexity_before']:.1f}",
            f"{sft['perplexity_after']:.1f}",
        ],
        [
            "reward model: held-out accuracy",
            f"{100 * reward['accuracy_before']:.1f}%",
            f"{100 * reward['accuracy_after']:.1f}%",
        ],
        ["PPO: mean held-out score", f"{ppo['score_before']:.2f}", f"{ppo['score_after']:.2f}"],
        ["  in standard deviations", "", f"{ppo['score_gain_sd']:+.2f}"],
        ["  KL per answer, nats", "0.00", f"{ppo['kl']:.2f}"],
        ["  answer length, tokens", f"{ppo['length_before']:.1f}", f"{ppo['length_after']:.1f}"],
    ]
    if "judge_before" in ppo:
        rows.append(
            ["  independent judge", f"{ppo['judge_before']:.3f}", f"{ppo['judge_after']:.3f}"]
        )
    lines = ["", table(rows, header=["", "before", "after"])]
    lines += shortfalls(sft, reward, ppo)
    for sample in summary["samples"]:
        lines += ["", sample["prompt"]]
        lines += [f"  {name.upper():5}{sample[name].strip()!r}" for name in ("base", "sft", "rlhf")]
    seconds = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items())
    return "\n".join([*lines, "", f"seconds: {seconds}"])


def shortfalls(sft: dict[str, float], reward: dict[str, float], ppo: dict[str, float]) -> list[str]:
    """Return a line for each result that is no better after its step, or not beyond the noise."""
    found = []
    if sft["perplexity_after"] >= sft["perplexity_before"]:
        found.append(
            "SFT did not lower the perplexity: it took too few updates, or its learning rate is "
            "too high."
        )
    if reward["accuracy_after"] <= reward["accuracy_before"]:
        found.append(
            "The reward model did not become more accurate: it saw too few pairs, or they do not "
            "agree."
        )
    if ppo["score_after"] <= ppo["score_before"]:
        found.append(
            "PPO did not raise the score: it took too few rollouts, or --kl_coef holds it back."
        )
    elif ppo["score_gain_lower95"] <= 0:
        found.append(
            f"PPO raised the score by no more than the noise of {ppo['prompts']:.0f} held-out "
            f"prompts (95% interval of the gain from {ppo['score_gain_lower95']:.2f}): it took "
            "too few rollouts, or these are too few prompts to tell."
        )
    return ["", *(textwrap.fill(text, width=100) for text in found)] if found else []


def where_next(kind: str, models: dict[str, str], *, report: str, summary: str) -> str:
    """Return the last words of a run: where everything is, and what to do next.

    Args:
        kind: "demo", "tiny" or "real".
        models: folders by name, as in the summary.
        report: path of report.html.
        summary: path of summary.json.
    """
    # The demo's model continues texts; it was not trained on conversations.
    flags = " --prompt_format plain --temperature 1" if kind == "demo" else ""
    rows = [
        ("SFT model", models["sft"]),
        ("reward model", models["reward"]),
        ("RLHF model", models["actor"]),
        ("chat with it", f"python inference/chat.py --path {shlex.quote(models['actor'])}{flags}"),
        ("your own data", "--data-path rows.jsonl, checked by python -m dschat.data.inspect"),
        ("curves and answers", report),
        ("numbers", summary),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:{width}}  {value}" for name, value in rows)])
