"""report.html: one page without requests that shows what a run has done.

Every string of a run is escaped: a model may answer with markup. The page holds no script, and its
content security policy forbids any.
"""

import datetime
import difflib
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dschat.report.charts import histogram, line_chart, number_text
from dschat.report.run_files import (
    Curve,
    Prompt,
    Run,
    is_run,
    read_run,
    read_summary,
    step_folders,
    summary_prompts,
)
from dschat.report.style import STYLE
from dschat.runtime.files import write_text

REPORT = "report.html"
MOST_PROMPTS = 20
MOST_CHARACTERS = 4000  # of an answer

# Title and metrics of each chart. Every other metric gets a separate chart.
CHARTS = (
    ("Loss", ("train/loss", "eval/loss")),
    ("Perplexity", ("eval/perplexity",)),
    ("Accuracy", ("train/accuracy", "rewards/accuracy", "eval/accuracy")),
    ("Margin between chosen and rejected", ("rewards/margin", "eval/margin")),
    ("Scores of pairs", ("eval/chosen_score", "eval/rejected_score")),
    ("Implicit rewards of pairs", ("eval/chosen_reward", "eval/rejected_reward")),
    ("Score", ("objective/score", "eval/score")),
    ("KL to the reference, nats an answer", ("objective/kl", "eval/kl")),
    ("Entropy, nats a token", ("objective/entropy",)),
    ("Answer length, tokens", ("response/length_mean", "eval/length")),
    ("Share of answers that end", ("response/eos_rate", "eval/eos_rate")),
    ("Explained variance of the critic", ("value/explained_variance",)),
    ("Policy loss", ("policy/loss",)),
    ("Value loss", ("value/loss",)),
    ("Clipped share", ("policy/clipfrac", "value/clipfrac")),
    ("Seconds a phase", ("time/generate_s", "time/score_s", "time/train_s", "time/step_s")),
    ("Tokens a second", ("perf/tokens_per_s",)),
    ("Memory used, GiB", ("perf/mem_gib",)),
    ("Learning rate", ("train/lr", "lr/actor", "lr/critic")),
    ("Gradient norm", ("train/grad_norm", "grad_norm/actor", "grad_norm/critic")),
)
# Held-out results, of which the first and the last value are shown.
RESULTS = {
    "eval/perplexity": "held-out perplexity",
    "eval/accuracy": "held-out accuracy",
    "eval/loss": "held-out loss",
    "eval/margin": "held-out margin",
    "eval/score": "held-out score",
    "eval/kl": "KL to the reference, nats an answer",
    "eval/length": "answer length, tokens",
    "eval/eos_rate": "share of answers that end",
}


def write_report(folder: str | Path) -> Path:
    """Write report.html into the output folder of a step or of e2e_rlhf.py, and return its path.

    Raises:
        ValueError: the folder holds no metrics of a run.
    """
    folder = Path(folder)
    if is_run(folder):
        text = run_page(read_run(folder))
    else:
        runs = [read_run(path) for path in step_folders(folder)]
        if not runs:
            read_run(folder)  # raises
        text = pipeline_page(folder, runs)
    path = folder / REPORT
    write_text(path, text)
    return path


def run_page(run: Run) -> str:
    """Return the page of one step."""
    return _page(
        run.title,
        [f'<p class="soft">{_text(run.folder.name)}: {_models(run)}</p>', *_run_sections(run)],
    )


def pipeline_page(folder: Path, runs: list[Run]) -> str:
    """Return the page of the steps of e2e_rlhf.py."""
    summary = read_summary(folder)
    parts = [f'<p class="soft">{_text(folder.name)}</p>']
    results = [[run.title, *row] for run in runs for row in _result_rows(run)]
    parts.append(_table(["step", "result", "before", "after"], results))
    prompts = summary_prompts(summary)
    if prompts:
        parts += [
            "<h2>Greedy answers of the base, SFT and RLHF models</h2>",
            _prompt_list(prompts),
        ]
    if summary.get("seconds"):
        seconds = [f"{_text(part)} {value:.0f}" for part, value in summary["seconds"].items()]
        parts.append(f'<p class="soft">Seconds: {", ".join(seconds)}.</p>')
    for run in runs:
        parts += [f"<h2>{_text(run.title)}</h2>", f'<p class="soft">{_models(run)}</p>']
        parts += _run_sections(run)
    return _page("Three steps of RLHF", parts)


def comparison_page(runs: Mapping[str, Run]) -> str:
    """Return a page with the curves of several runs in the same charts.

    Args:
        runs: by the name to show.
    """
    parts = ['<p class="soft">' + ", ".join(_text(name) for name in runs) + "</p>"]
    rows = []
    for key, title in RESULTS.items():
        if any(key in run.curves for run in runs.values()):
            last = [run.curves[key][-1][1] if key in run.curves else None for run in runs.values()]
            rows.append([title, *("" if v is None else number_text(v) for v in last)])
    if rows:
        parts += ["<h2>Results</h2>", _table(["last value", *runs], rows)]
    units = sorted({run.unit for run in runs.values()})
    charts = [
        line_chart(key, found, x_label=" or ".join(units))
        for key in _ordered_keys(runs.values())
        if (found := {name: run.curves[key] for name, run in runs.items() if key in run.curves})
    ]
    parts += ["<h2>Curves</h2>", _grid(charts)]
    parts += ["<h2>Settings that differ</h2>", _differences(runs)]
    return _page("Comparison of runs", parts)


def _run_sections(run: Run) -> list[str]:
    parts = [_table(["result", "before", "after"], _result_rows(run)), _alarm_list(run)]
    parts.append(_grid(_charts(run)))
    others = _other_charts(run)
    if others:
        parts.append(f"<details><summary>Other metrics</summary>{_grid(others)}</details>")
    if run.prompts:
        parts += [
            f"<h3>Sampled answers to held-out prompts ({min(MOST_PROMPTS, len(run.prompts))} of "
            f"{len(run.prompts)})</h3>",
            _prompt_list(run.prompts[:MOST_PROMPTS]),
        ]
    parts.append(_facts(run))
    return parts


def _alarm_list(run: Run) -> str:
    """Return the alarms of step 3 as HTML; "" if there are none."""
    if not run.alarms:
        return ""
    rows = [
        f"<li>After rollout {rollout}, {_text(message)}</li>" for rollout, message in run.alarms
    ]
    return f"<h3>Alarms</h3><ul>{''.join(rows)}</ul>"


def _result_rows(run: Run) -> list[list[str]]:
    return [
        [title, number_text(run.curves[key][0][1]), number_text(run.curves[key][-1][1])]
        for key, title in RESULTS.items()
        if key in run.curves
    ]


def _charts(run: Run) -> list[str]:
    found = []
    for title, keys in CHARTS:
        curves = {key: run.curves[key] for key in keys if key in run.curves}
        if curves:
            found.append(line_chart(title, curves, x_label=run.unit))
        if title.startswith("Margin") and any(run.margins.values()):
            found.append(
                histogram("Held-out margins, share of pairs", run.margins, x_label="margin")
            )
    return found


def _other_charts(run: Run) -> list[str]:
    known = {key for _, keys in CHARTS for key in keys}
    return [
        line_chart(key, {key: points}, x_label=run.unit)
        for key, points in run.curves.items()
        if key not in known
    ]


def _ordered_keys(runs: Iterable[Run]) -> list[str]:
    """Return every metric of the runs: first those of CHARTS, in their order."""
    every: dict[str, Curve] = {}
    for run in runs:
        every |= run.curves
    first = [key for _, keys in CHARTS for key in keys if key in every]
    return first + [key for key in every if key not in first]


def _prompt_list(prompts: list[Prompt]) -> str:
    parts = ['<p class="soft">Marked words are not in the answer of the model before.</p>']
    for prompt in prompts:
        answers = []
        before = None
        for name, answer in prompt.answers.items():
            words = answer.text.strip()[:MOST_CHARACTERS]
            score = "" if answer.score is None else f", score {answer.score:.2f}"
            answers.append(
                f'<div class="answer"><span class="name">{_text(name.upper())}{score}</span>'
                f"{_marked(before, words)}</div>"
            )
            before = words
        parts.append(
            f'<div class="prompt"><div class="question">{_text(prompt.text)}</div>'
            f'<div class="answers">{"".join(answers)}</div></div>'
        )
    return "".join(parts)


def _marked(before: str | None, after: str) -> str:
    """Return `after` as HTML, with the words marked that `before` lacks."""
    if before is None:
        return _text(after)
    old = re.findall(r"\s+|\S+", before)
    new = re.findall(r"\s+|\S+", after)
    parts = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        words = _text("".join(new[start:end]))
        parts.append(words if kind == "equal" or not words.strip() else f"<mark>{words}</mark>")
    return "".join(parts)


def _facts(run: Run) -> str:
    """Return the configuration, versions, hardware and memory of a run."""
    record = run.record
    memory = []
    if record.get("planned_memory_gib"):
        for place, gib in record["planned_memory_gib"].items():
            memory.append([f"planned, {place}", f"{gib:.2f} GiB"])
    if "perf/mem_gib" in run.curves:
        most = max(value for _, value in run.curves["perf/mem_gib"])
        memory.append(["used, most on rank 0", f"{most:.2f} GiB"])
    sections = {
        "Memory": memory,
        "Run": [
            [key, _plain(value)]
            for key, value in record.items()
            if not isinstance(value, (dict, list))
        ],
        "Hardware": _rows(record.get("hardware")),
        "Versions": _rows(record.get("versions")),
        "Configuration": _rows(record.get("config")),
    }
    tables = [f"<h3>{name}</h3>{_table(['', ''], rows)}" for name, rows in sections.items() if rows]
    return (
        "<details><summary>Memory, hardware, versions and configuration</summary>"
        f"{''.join(tables)}</details>"
    )


def _differences(runs: Mapping[str, Run]) -> str:
    """Return a table of the settings, versions and hardware that are not the same in all runs."""
    flat: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        groups = {"": run.record.get("config")}
        groups |= {key: run.record.get(key) for key in ("hardware", "versions")}
        for prefix, group in groups.items():
            for key, value in _rows(group):
                flat.setdefault(f"{prefix} {key}".strip(), {})[name] = value
    rows = [
        [key, *(values.get(name, "") for name in runs)]
        for key, values in flat.items()
        if len({values.get(name) for name in runs}) > 1
    ]
    return _table(["", *runs], rows) if rows else "<p>None.</p>"


def _models(run: Run) -> str:
    """Return the models that the run started from, as HTML."""
    config = run.record.get("config") or {}
    names = [
        str(config[key])
        for key in ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
        if config.get(key)
    ]
    return "started from " + " and ".join(map(_text, names)) if names else "no run.json"


def _rows(values: Any) -> list[list[str]]:
    if not isinstance(values, dict):
        return []
    return [[str(key), _plain(value)] for key, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header) if any(header) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _grid(figures: list[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _text(value: str) -> str:
    """Escape a string for HTML; half characters, which UTF-8 cannot hold, become question marks."""
    return escape(value.encode("utf-8", "replace").decode("utf-8"))


def _page(title: str, parts: list[str]) -> str:
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n"
        + "\n".join(parts)
        + f'\n<p class="soft">Made by dschat, {made}.'
        " Hold the pointer over a line or a point for its values.</p>\n</body>\n</html>\n"
    )
