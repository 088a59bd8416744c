"""Show that PPO learns, and check the results against bars.

    python scripts/reproduce_ppo.py --output docs/results/ppo --seeds 1 2 3 4 [--parallel 4]
    python scripts/reproduce_ppo.py --tiny --output /tmp/tiny   # two seeds, tiny model, on a CPU

The runs are step 3 on the default model of the demo with 1 and 4 epochs per rollout over several
seeds, a control with twenty times the KL coefficient, and sums checked by a function. Each run is
one launch of step 3. A run that has finished with the same flags and models is not repeated. Prints
a table of the bars and writes summary.json and, with matplotlib, ppo.png. Exits with 1 if a bar is
missed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.pipeline.summary import ppo_section, read_jsonl  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.tracking.table import table  # noqa: E402
from scripts._launches import fingerprints, flags_shown, run_step  # noqa: E402

MAIN = ROOT / "training" / "step3_rlhf_finetuning" / "main.py"
DEMO = (
    "--per_device_generation_batch_size 64 --per_device_training_batch_size 32 "
    "--per_device_eval_batch_size 128 --max_prompt_seq_len 32 --max_answer_seq_len 20 "
    "--actor_learning_rate 2e-5 --critic_learning_rate 2e-5 --kl_coef 0.15 --num_warmup_steps 4 "
    "--lr_scheduler_type constant_with_warmup --eval_interval 4 --data_split 0,0,1 "
    "--enable_hybrid_engine --no_compile"
)
ADDITION = (
    "--per_device_generation_batch_size 32 --num_samples_per_prompt 4 "
    "--per_device_training_batch_size 64 --per_device_eval_batch_size 128 --eval_prompts 256 "
    "--max_prompt_seq_len 96 --max_answer_seq_len 4 --actor_learning_rate 1e-5 --kl_coef 0.02 "
    "--advantage_estimator rloo --num_warmup_steps 4 --max_train_steps 60 "
    "--lr_scheduler_type constant_with_warmup --eval_interval 10 --data_split 0,0,1 "
    "--no_normalize_reward --enable_hybrid_engine --no_compile"
)
TINY = (
    "--per_device_generation_batch_size 64 --per_device_training_batch_size 64 "
    "--max_prompt_seq_len 32 --max_answer_seq_len 2 --actor_learning_rate 1e-3 "
    "--critic_learning_rate 6e-3 --kl_coef 0.02 --num_warmup_steps 0 "
    "--lr_scheduler_type constant_with_warmup --eval_interval 4 --eval_prompts 64 --dtype fp32 "
    "--data_split 0,0,1 --per_device_eval_batch_size 32 --no_normalize_reward"
)
PLOTTED = {
    "eval/score": "held-out score",
    "eval/kl": "KL per answer, nats",
    "eval/length": "answer length, tokens",
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for metrics, summary and figure"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--parallel", type=int, default=1, help="number of runs at a time; they share the GPU"
    )
    parser.add_argument(
        "--models",
        type=Path,
        help="output folder of e2e_rlhf.py; default: run its steps 1 and 2",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a miniature model, two seeds, minutes on a CPU"
    )
    return parser.parse_args()


def tiny_runs(work: Path) -> dict[str, list[str]]:
    """Return the flags of the runs on a miniature model.

    The answers have two bytes. The reward is a function: 1 if the first is a lowercase letter. A
    critic can know it after the first byte and not before, so it can explain half of the variance.
    """
    from dschat.demo.tiny_models import make_tiny_model
    from dschat.demo.toy import write_toy_data

    model = make_tiny_model(work / "tiny", family="llama")
    function = work / "letters.py"
    function.write_text(
        "def reward(prompts, answers, **columns):\n"
        "    return [float('a' <= answer[:1] <= 'z') for answer in answers]\n"
    )
    common = ["--data_path", str(write_toy_data(work / "data"))]
    common += ["--actor_model_name_or_path", str(model)]
    common += ["--critic_model_name_or_path", str(model)]
    common += ["--reward_fn", f"{function}:reward", *TINY.split()]
    return {
        "epochs1": [*common, "--ppo_epochs", "1", "--max_train_steps", "40"],
        "epochs4": [*common, "--ppo_epochs", "4", "--max_train_steps", "20"],
    }


def demo_runs(args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """Return the flags of the four kinds of runs on the default model of the demo.

    Without --models, train the SFT and reward models first.
    """
    from addition_reward import write_data

    from dschat.demo.reviews import build_reviews
    from dschat.demo.smollm2 import smollm2_folder

    models = args.models
    if models is None:
        models = args.output / "models"
        command = [sys.executable, str(ROOT / "e2e_rlhf.py"), "--output-dir", str(models)]
        for step, kind in (("1", "actor"), ("2", "reward")):
            if not list(models.glob(f"{kind}-models/*/finished.json")):
                subprocess.run([*command, "--step", step], check=True)
    actor = next(models.glob("actor-models/*/finished.json")).parent
    critic = next(models.glob("reward-models/*/finished.json")).parent
    common = ["--data_path", str(build_reviews() / "prompts")]
    common += ["--actor_model_name_or_path", str(actor)]
    common += ["--critic_model_name_or_path", str(critic), *DEMO.split()]
    reward_function = f"{ROOT / 'scripts' / 'addition_reward.py'}:reward"
    addition = ["--data_path", str(write_data(work / "addition"))]
    addition += ["--actor_model_name_or_path", str(smollm2_folder())]
    addition += ["--reward_fn", reward_function, *ADDITION.split()]
    return {
        "epochs1": [*common, "--ppo_epochs", "1", "--max_train_steps", "40"],
        "epochs4": [*common, "--ppo_epochs", "4", "--max_train_steps", "24"],
        "control": [*common, "--ppo_epochs", "1", "--max_train_steps", "40", "--kl_coef", "3.0"],
        "addition": addition,
    }


def launch(name: str, flags: list[str], seed: int, output: Path, work: Path) -> float:
    """Launch step 3 once and write its metrics and a record to `output`; return the seconds.

    A run that `output` has with the same flags and models is not repeated.

    Raises:
        RuntimeError: the run failed; the message names the log.
    """
    target = output / f"{name}_seed{seed}.jsonl"
    record = output / f"{name}_seed{seed}.json"
    asked = {"flags": flags_shown(flags), "models": fingerprints(flags)}
    if record.exists():
        known = json.loads(record.read_text())
        # Early records name the models only by their folders.
        same_models = known.get("models", asked["models"]) == asked["models"]
        if known["flags"] == asked["flags"] and same_models:
            return known["seconds"]
    folder = work / f"{name}_seed{seed}"
    words = [*flags, "--seed", str(seed), "--output_dir", str(folder)]
    seconds = run_step(MAIN, words, log=output / f"{name}_seed{seed}.log")
    shutil.copy(folder / "metrics.jsonl", target)
    judge = None
    if name in ("epochs1", "epochs4", "control") and "--reward_fn" not in flags:
        from dschat.demo.reviews import sentiment_judge

        judge = sentiment_judge()
    section = ppo_section(folder, judge=judge)
    key = "value/explained_variance"
    variances = [line[key] for line in read_jsonl(target) if key in line][-5:]
    if variances:
        section["explained_variance_last5"] = sum(variances) / len(variances)
    write_json(record, {**asked, "seed": seed, "seconds": seconds, "result": section})
    print(
        f"{name}, seed {seed}: {seconds:.0f} s, "
        f"score {section['score_before']:.3f} -> {section['score_after']:.3f}",
        flush=True,
    )
    return seconds


def seeds_of(name: str, seeds: list[int]) -> list[int]:
    """Return the seeds of a kind of run: the control and the sums run with the first one only."""
    return seeds if name.startswith("epochs") else seeds[:1]


def mean_gains(output: Path, name: str, seeds: list[int]) -> dict[int, float]:
    """Return the gain of the held-out score at each evaluated rollout, a mean over the seeds.

    The unit is the score's standard deviation before training.
    """
    gains: dict[int, list[float]] = {}
    for seed in seeds:
        lines = evaluations(output, name, seed)
        for line in lines:
            gain = (line["eval/score"] - lines[0]["eval/score"]) / lines[0]["eval/score_sd"]
            gains.setdefault(line["step"], []).append(gain)
    return {step: sum(found) / len(found) for step, found in gains.items()}


def evaluations(output: Path, name: str, seed: int) -> list[dict]:
    """Return the lines of a run's metrics that hold an evaluation."""
    lines = read_jsonl(output / f"{name}_seed{seed}.jsonl")
    return [line for line in lines if "eval/score" in line]


def judge_bars(output: Path, names: list[str], seeds: list[int]) -> tuple[list[list[str]], bool]:
    """Return the rows of the table of bars, and whether all bars are met."""
    rows, all_met = [], True

    def bar(text: str, value: str, met: bool) -> None:
        nonlocal all_met
        all_met &= met
        rows.append([text, value, "yes" if met else "NO"])

    for seed in seeds:
        results = {}
        for name in names:
            if seed in seeds_of(name, seeds):
                record = json.loads((output / f"{name}_seed{seed}.json").read_text())
                results[name] = record["result"]
        for name in ("epochs1", "epochs4"):
            found = results[name]
            gain = found["score_gain_sd"]
            bar(f"{name}, seed {seed}: score gain, sd", f"{gain:.2f}", gain >= 1)
            bar(f"{name}, seed {seed}: KL per answer", f"{found['kl']:.2f}", found["kl"] <= 8)
            variance = found["explained_variance_last5"]
            bar(f"{name}, seed {seed}: explained variance", f"{variance:.2f}", variance > 0.3)
            if "judge_gain_lower95" in found:
                lower = found["judge_gain_lower95"]
                bar(f"{name}, seed {seed}: judge's gain, lower bound", f"{lower:.3f}", lower > 0)
        if "control" in results:
            found = results["control"]
            kl, gain = found["kl"], found["score_gain_sd"]
            text = f"{kl:.2f}, {gain:+.2f} sd"
            bar(f"control, seed {seed}: KL, score", text, kl < 0.5 and abs(gain) < 0.25)
        if "addition" in results:
            found = results["addition"]
            text = f"{100 * found['score_before']:.0f}% -> {100 * found['score_after']:.0f}%"
            bar(f"addition, seed {seed}: exact match", text, found["score_after"] >= 0.7)
    one = mean_gains(output, "epochs1", seeds)
    four = mean_gains(output, "epochs4", seeds)
    last = max(one)
    reached = next((step for step, gain in sorted(four.items()) if gain >= one[last]), None)
    text = f"rollouts of 4 epochs to the gain of {last} of one, mean over seeds"
    bar(text, str(reached), reached is not None and reached <= last / 2)
    return rows, all_met


def draw(output: Path, names: list[str], seeds: list[int]) -> None:
    """Draw held-out score, KL and length over the rollouts, with one line for each run."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib)")
        return
    kinds = [name for name in names if name != "addition"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for color, name in zip(("tab:blue", "tab:orange", "tab:gray"), kinds, strict=False):
        label: str | None = name  # for the first line of a kind only
        for seed in seeds_of(name, seeds):
            if not (output / f"{name}_seed{seed}.jsonl").exists():
                continue
            lines = evaluations(output, name, seed)
            steps = [line["step"] for line in lines]
            for axis, key in zip(axes, PLOTTED, strict=True):
                axis.plot(steps, [line[key] for line in lines], color=color, label=label)
            label = None
    for axis, title in zip(axes, PLOTTED.values(), strict=True):
        axis.set(xlabel="rollouts", title=title)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output / "ppo.png", dpi=120)


def main() -> None:
    """Run what has not finished, judge the bars, and exit with 1 if one is missed."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = args.seeds[:2] if args.tiny else args.seeds
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        runs = tiny_runs(work) if args.tiny else demo_runs(args, work)
        with ThreadPoolExecutor(args.parallel) as pool:
            jobs = [
                pool.submit(launch, name, flags, seed, args.output, work)
                for name, flags in runs.items()
                for seed in seeds_of(name, seeds)
            ]
            wait(jobs)  # else the first failure would be raised before the others have ended
            seconds = [job.result() for job in jobs]
    rows, all_met = judge_bars(args.output, list(runs), seeds)
    print("\n" + table(rows, header=["bar", "found", "met"]))
    command = f"python scripts/{Path(__file__).name} {flags_shown(sys.argv[1:])}"
    record = {
        "command": command,
        "bars": rows,
        "all_met": all_met,
        "launch_seconds": seconds,
        "parallel": args.parallel,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output / "summary.json", record)
    draw(args.output, list(runs), seeds)
    sys.exit(0 if all_met else 1)


if __name__ == "__main__":
    main()
