"""The reward curves of a sweep over ZeRO stage, Hybrid Engine, offload and LoRA in one figure, and a table of the runs.

    python scripts/plot_sweep.py OUTPUT [--figure sweep.png] [--metric objective/score] [--smooth 10]

OUTPUT holds the runs' output folders, as the sweep of step 3 names them: z2_he_true_offload_false_lora_true and so on.
Each has a metrics.jsonl. Of sixteen runs those that are missing or empty are named, and the others are drawn.
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
STAGES, SWITCH = ("2", "3"), ("false", "true")


def main() -> int:
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
        "--metric", default="objective/score", help="what is drawn, by its name in metrics.jsonl"
    )
    parser.add_argument("--smooth", type=int, default=1, help="rollouts of the moving average")
    return parser.parse_args()


def read_curves(output: Path, metric: str) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """(step, value) of each of the sixteen runs that have any, by folder name, and the names of the others."""
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
    """Rollouts, first, last and highest value."""
    values = [value for _, value in curve]
    highest = max((value for value in values if not math.isnan(value)), default=math.nan)
    return [str(curve[-1][0]), *(f"{value:.3f}" for value in (values[0], values[-1], highest))]


def moving_average(values: list[float], window: int) -> list[float]:
    """At each place the mean of it and up to `window` - 1 places before."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1))
        for i in range(len(values))
    ]


def draw(
    panels: dict[str, dict[str, list[tuple[int, float]]]], figure: Path, *, metric: str, window: int
) -> None:
    """Panels of curves by title and folder name; colour tells stage and Hybrid Engine, a dashed line offload."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib)")
        return
    colors = dict(
        zip(itertools.product(STAGES, SWITCH), ("tab:blue", "tab:cyan", "tab:red", "tab:orange"))
    )
    size = (2 + 6 * len(panels), 5.5)
    canvas, grid = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = grid[0]
    for axis, (title, curves) in zip(axes, panels.items()):
        for name, curve in curves.items():
            stage, hybrid, offload, _ = name[1:].split("_")[::2]
            steps, values = zip(*curve)
            axis.plot(
                steps,
                moving_average(list(values), window),
                color=colors[stage, hybrid],
                linestyle="--" if offload == "true" else "-",
                label=f"ZeRO-{stage}{', Hybrid Engine' * (hybrid == 'true')}{', offload' * (offload == 'true')}",
            )
        axis.set(xlabel="rollouts", title=title)
    axes[0].set_ylabel(metric)
    # One legend below the panels, where it hides no curve.
    entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels())}
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


if __name__ == "__main__":
    sys.exit(main())
