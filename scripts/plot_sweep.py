r"""Draw the reward curves of a sweep over ZeRO stage, Hybrid Engine, offload and LoRA.

    python scripts/plot_sweep.py OUTPUT [--figure sweep.png] [--metric objective/score] \
        [--smooth 10]

OUTPUT holds the output folders of the runs, with the names that the sweep of step 3 gives them:
z2_he_true_offload_false_lora_true and so on. Each has a metrics.jsonl. Of the sixteen runs those
that are missing or empty are named, and the others are drawn in one figure and listed in a table.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.pipeline.summary import read_jsonl  # noqa: E402
from dschat.tracking.table import table  # noqa: E402

NAME = "z{}_he_{}_offload_{}_lora_{}"
STAGES = ("2", "3")
SWITCH = ("false", "true")
COLORS = {  # by ZeRO stage and Hybrid Engine
    ("2", "false"): "tab:blue",
    ("2", "true"): "tab:cyan",
    ("3", "false"): "tab:red",
    ("3", "true"): "tab:orange",
}


def main() -> int:
    """Print the table and draw the figure; return 1 if there are no runs."""
    args = parse_args()
    curves, missing = read_curves(args.output, args.metric)
    for name in missing:
        print(f"no {args.metric} in {args.output / name}/metrics.jsonl")
    if not curves:
        return 1
    rows = [[name, *summary(curve)] for name, curve in curves.items()]
    print(table(rows, header=["run", "rollouts", "first", "last", "highest"]))
    panels = {
        title: {name: curve for name, curve in curves.items() if name.endswith(f"lora_{lora}")}
        for title, lora in (("without LoRA", "false"), ("with LoRA", "true"))
    }
    draw(panels, args.figure or args.output / "sweep.png", metric=args.metric, window=args.smooth)
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument(
        "--figure",
        type=Path,
        help="file of the figure; default: sweep.png in the folder of the runs",
    )
    parser.add_argument(
        "--metric", default="objective/score", help="the metric to draw, a name in metrics.jsonl"
    )
    parser.add_argument(
        "--smooth", type=int, default=1, help="length of the moving average, in rollouts"
    )
    return parser.parse_args()


def read_curves(output: Path, metric: str) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Read the curves of the sixteen runs.

    Returns:
        The (step, value) pairs of each run that has any, by folder name, and the names of the
        other runs.
    """
    curves, missing = {}, []
    for values in itertools.product(STAGES, SWITCH, SWITCH, SWITCH):
        name = NAME.format(*values)
        file = output / name / "metrics.jsonl"
        lines = read_jsonl(file) if file.exists() else []
        # A value that is not finite is null in the file, and a gap in the curve.
        curve = [
            (line["step"], math.nan if line[metric] is None else line[metric])
            for line in lines
            if metric in line
        ]
        if curve:
            curves[name] = curve
        else:
            missing.append(name)
    return curves, missing


def summary(curve: list[tuple[int, float]]) -> list[str]:
    """Return the number of rollouts and the first, last and highest value, as text."""
    values = [value for _, value in curve]
    highest = max((value for value in values if not math.isnan(value)), default=math.nan)
    return [str(curve[-1][0]), *(f"{value:.3f}" for value in (values[0], values[-1], highest))]


def moving_average(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` - 1 values before it."""
    averages = []
    for end in range(1, len(values) + 1):
        begin = max(0, end - window)
        averages.append(sum(values[begin:end]) / (end - begin))
    return averages


def draw(
    panels: dict[str, dict[str, list[tuple[int, float]]]], figure: Path, *, metric: str, window: int
) -> None:
    """Draw panels of curves, by title and folder name, into one figure.

    The color shows ZeRO stage and Hybrid Engine; a dashed line shows offload.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib)")
        return
    size = (2 + 6 * len(panels), 5.5)
    canvas, grid = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = grid[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, curve in curves.items():
            stage, hybrid, offload, _ = name[1:].split("_")[::2]
            steps, values = zip(*curve, strict=True)
            axis.plot(
                steps,
                moving_average(list(values), window),
                color=COLORS[stage, hybrid],
                linestyle="--" if offload == "true" else "-",
                label=curve_label(stage, hybrid, offload),
            )
        axis.set(xlabel="rollouts", title=title)
    axes[0].set_ylabel(metric)
    # One legend below the panels, so that it hides no curve.
    entries = {}
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, lines, strict=True))
    if entries:
        canvas.legend(
            entries.values(),
            entries,
            loc="outside lower center",
            ncols=min(8, len(entries), 3 * len(panels)),
        )
    figure.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(figure, dpi=120)
    print(f"wrote {figure}")


def curve_label(stage: str, hybrid: str, offload: str) -> str:
    """Return a run's text in the legend."""
    label = f"ZeRO-{stage}"
    if hybrid == "true":
        label += ", Hybrid Engine"
    if offload == "true":
        label += ", offload"
    return label


if __name__ == "__main__":
    sys.exit(main())
