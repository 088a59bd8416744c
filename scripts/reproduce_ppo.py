"""Show that PPO learns: step 3 on the embedded default with 1 and 4 epochs per rollout over several seeds, a control
with twenty times the KL coefficient, and sums checked by a function.

    python scripts/reproduce_ppo.py --output docs/results/ppo --seeds 1 2 3 4 [--parallel 4]
    python scripts/reproduce_ppo.py --tiny --output /tmp/tiny          # two seeds on a miniature model, on a CPU

Every run is one launch of step 3; one that has finished with the same flags and models is not run again. Prints a table of
the bars and writes summary.json and, with matplotlib, ppo.png. Exits 1 where a bar is missed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.pipeline.summary import ppo_section, read_jsonl  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions
from dschat.runtime.manifest import file_entry  # noqa: E402
from dschat.runtime.ports import free_port  # noqa: E402
from dschat.tracking.table import table

MAIN = ROOT / "training" / "step3_rlhf_finetuning" / "main.py"
DEMO = (
    "--per_device_generation_batch_size 64 --per_device_training_batch_size 32 --per_device_eval_batch_size 128 "
    "--max_prompt_seq_len 32 --max_answer_seq_len 20 --actor_learning_rate 2e-5 --critic_learning_rate 2e-5 "
    "--kl_coef 0.15 --num_warmup_steps 4 --lr_scheduler_type constant_with_warmup --eval_interval 4 --data_split 0,0,1 "
    "--enable_hybrid_engine --no_compile"
)
ADDITION = (
    "--per_device_generation_batch_size 32 --num_samples_per_prompt 4 --per_device_training_batch_size 64 "
    "--per_device_eval_batch_size 128 --eval_prompts 256 --max_prompt_seq_len 96 --max_answer_seq_len 4 "
    "--actor_learning_rate 1e-5 --kl_coef 0.02 --advantage_estimator rloo --num_warmup_steps 4 --max_train_steps 60 "
    "--lr_scheduler_type constant_with_warmup --eval_interval 10 --data_split 0,0,1 --no_normalize_reward "
    "--enable_hybrid_engine --no_compile"
)
TINY = (
    "--per_device_generation_batch_size 64 --per_device_training_batch_size 64 --max_prompt_seq_len 32 "
    "--max_answer_seq_len 2 --actor_learning_rate 1e-3 --critic_learning_rate 6e-3 --kl_coef 0.02 --num_warmup_steps 0 "
    "--lr_scheduler_type constant_with_warmup --eval_interval 4 --eval_prompts 64 --dtype fp32 --data_split 0,0,1 "
    "--per_device_eval_batch_size 32 "
    "--no_normalize_reward"
)


PLOTTED = {
    "eval/score": "held-out score",
    "eval/kl": "KL per answer, nats",
    "eval/length": "answer length, tokens",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of metrics, summary and figure"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--parallel", type=int, default=1, help="runs at a time, which share the GPU"
    )
    parser.add_argument(
        "--models",
        type=Path,
        help="output folder of e2e_rlhf.py; default: its steps 1 and 2 are run",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a miniature model, seeds 1 and 2, minutes on a CPU"
    )
    return parser.parse_args()


def tiny_runs(work: Path) -> dict[str, list[str]]:
    """Runs on a miniature model whose reward is a function: whether the answer, two bytes, begins with a small letter.

    A critic can know that after the first byte, and not before: half of the variance is there to be explained.
    """
    from dschat.demo.tiny_models import make_tiny_model
    from dschat.demo.toy import write_toy_data

    model = make_tiny_model(work / "tiny", family="llama")
    function = work / "letters.py"
    function.write_text(
        "def reward(prompts, answers, **columns):\n"
        "    return [float('a' <= answer[:1] <= 'z') for answer in answers]\n"
    )
    common = [
        "--data_path",
        str(write_toy_data(work / "data")),
        "--actor_model_name_or_path",
        str(model),
    ]
    common += [
        "--critic_model_name_or_path",
        str(model),
        "--reward_fn",
        f"{function}:reward",
        *TINY.split(),
    ]
    return {
        "epochs1": [*common, "--ppo_epochs", "1", "--max_train_steps", "40"],
        "epochs4": [*common, "--ppo_epochs", "4", "--max_train_steps", "20"],
    }


def demo_runs(args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """The four kinds of runs on the embedded default; trains its SFT and reward models where none are given."""
    from addition_reward import write_data

    from dschat.demo.reviews import build_reviews
    from dschat.demo.smollm2 import smollm2_folder

    models = args.models
    if models is None:
        models = args.output / "models"
        command = [sys.executable, str(ROOT / "e2e_rlhf.py"), "--output-dir", str(models)]
        for step in ("1", "2"):
            if not list(
                models.glob(f"{'actor' if step == '1' else 'reward'}-models/*/finished.json")
            ):
                subprocess.run([*command, "--step", step], check=True)
    actor, critic = (
        next((models / f"{kind}-models").glob("*/finished.json")).parent
        for kind in ("actor", "reward")
    )
    common = [
        "--data_path",
        str(build_reviews() / "prompts"),
        "--actor_model_name_or_path",
        str(actor),
    ]
    common += ["--critic_model_name_or_path", str(critic), *DEMO.split()]
    addition = [
        "--data_path",
        str(write_data(work / "addition")),
        "--actor_model_name_or_path",
        str(smollm2_folder()),
    ]
    addition += [
        "--reward_fn",
        f"{ROOT / 'scripts' / 'addition_reward.py'}:reward",
        *ADDITION.split(),
    ]
    return {
        "epochs1": [*common, "--ppo_epochs", "1", "--max_train_steps", "40"],
        "epochs4": [*common, "--ppo_epochs", "4", "--max_train_steps", "24"],
        "control": [*common, "--ppo_epochs", "1", "--max_train_steps", "40", "--kl_coef", "3.0"],
        "addition": addition,
    }


def launch(name: str, flags: list[str], seed: int, output: Path, work: Path) -> float:
    """One launch of step 3; its metrics and first and last evaluations go to `output`. Returns seconds.

    Raises:
        RuntimeError: it failed; names the log.
    """
    target = output / f"{name}_seed{seed}.jsonl"
    record = output / f"{name}_seed{seed}.json"
    asked = {"flags": flags_shown(flags), "models": fingerprints(flags)}
    if record.exists():
        known = json.loads(record.read_text())
        # Early records name the models by their folders alone.
        if (
            known["flags"] == asked["flags"]
            and known.get("models", asked["models"]) == asked["models"]
        ):
            return known["seconds"]
    folder = work / f"{name}_seed{seed}"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += ["--num_gpus" if has_gpu() else "--num_accelerators", "1", str(MAIN), *flags]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    started = time.monotonic()
    log = output / f"{name}_seed{seed}.log"
    with open(log, "w") as file:
        if subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode:
            raise RuntimeError(f"{name}, seed {seed}, failed; see {log}")
    seconds = time.monotonic() - started
    log.unlink()
    shutil.copy(folder / "metrics.jsonl", target)
    judge = None
    if name in ("epochs1", "epochs4", "control") and "--reward_fn" not in flags:
        from dschat.demo.reviews import sentiment_judge

        judge = sentiment_judge()
    section = ppo_section(folder, judge=judge)
    last = [line for line in read_jsonl(target) if "value/explained_variance" in line][-5:]
    if last:
        section["explained_variance_last5"] = sum(
            line["value/explained_variance"] for line in last
        ) / len(last)
    write_json(record, {**asked, "seed": seed, "seconds": seconds, "result": section})
    print(
        f"{name}, seed {seed}: {seconds:.0f} s, score {section['score_before']:.3f} -> {section['score_after']:.3f}",
        flush=True,
    )
    return seconds


def seeds_of(name: str, seeds: list[int]) -> list[int]:
    """Every seed for the runs that are compared, the first alone for the control and the sums."""
    return seeds if name.startswith("epochs") else seeds[:1]


def flags_shown(flags: list[str]) -> str:
    """The flags without this machine's paths."""
    parts = [word.rpartition("=") for word in flags]
    return " ".join(
        name + mark + (Path(end).name if os.path.isabs(end) else end) for name, mark, end in parts
    )


def fingerprints(flags: list[str]) -> dict[str, str]:
    """Each flag that names a model's folder, and the beginning of a sha256 over its configuration and weights."""
    found = {}
    for flag, word in zip(flags, flags[1:]):
        folder = Path(word)
        if (folder / "config.json").is_file():
            files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
            sums = "".join(file_entry(file)["sha256"] for file in files)
            found[flag] = hashlib.sha256(sums.encode()).hexdigest()[:12]
    return found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def mean_gains(output: Path, name: str, seeds: list[int]) -> dict[int, float]:
    """Evaluated rollouts to the held-out score's gain in standard deviations before training, mean over the seeds."""
    gains: dict[int, list[float]] = {}
    for seed in seeds:
        lines = [
            line for line in read_jsonl(output / f"{name}_seed{seed}.jsonl") if "eval/score" in line
        ]
        for line in lines:
            gain = (line["eval/score"] - lines[0]["eval/score"]) / lines[0]["eval/score_sd"]
            gains.setdefault(line["step"], []).append(gain)
    return {step: sum(found) / len(found) for step, found in gains.items()}


def judge_bars(output: Path, names: list[str], seeds: list[int]) -> tuple[list[list[str]], bool]:
    """The table's rows, and whether all bars are met."""
    rows, all_met = [], True

    def bar(text: str, value: str, met: bool) -> None:
        nonlocal all_met
        all_met &= met
        rows.append([text, value, "yes" if met else "NO"])

    for seed in seeds:
        run = [name for name in names if seed in seeds_of(name, seeds)]
        results = {
            name: json.loads((output / f"{name}_seed{seed}.json").read_text())["result"]
            for name in run
        }
        for name in ("epochs1", "epochs4"):
            found = results[name]
            bar(
                f"{name}, seed {seed}: score gain, sd",
                f"{found['score_gain_sd']:.2f}",
                found["score_gain_sd"] >= 1,
            )
            bar(f"{name}, seed {seed}: KL per answer", f"{found['kl']:.2f}", found["kl"] <= 8)
            variance = found["explained_variance_last5"]
            bar(f"{name}, seed {seed}: explained variance", f"{variance:.2f}", variance > 0.3)
            if "judge_gain_lower95" in found:
                lower = found["judge_gain_lower95"]
                bar(f"{name}, seed {seed}: judge's gain, lower bound", f"{lower:.3f}", lower > 0)
        if "control" in results:
            found = results["control"]
            text = f"{found['kl']:.2f}, {found['score_gain_sd']:+.2f} sd"
            bar(
                f"control, seed {seed}: KL, score",
                text,
                found["kl"] < 0.5 and abs(found["score_gain_sd"]) < 0.25,
            )
        if "addition" in results:
            found = results["addition"]
            text = f"{100 * found['score_before']:.0f}% -> {100 * found['score_after']:.0f}%"
            bar(f"addition, seed {seed}: exact match", text, found["score_after"] >= 0.7)
    one, four = (mean_gains(output, name, seeds) for name in ("epochs1", "epochs4"))
    last = max(one)
    reached = next((step for step, gain in sorted(four.items()) if gain >= one[last]), None)
    text = f"rollouts of 4 epochs to the gain of {last} of one, mean over seeds"
    bar(text, str(reached), reached is not None and reached <= last / 2)
    return rows, all_met


def draw(output: Path, names: list[str], seeds: list[int]) -> None:
    """Held-out score, KL and length over rollouts, one line a run."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib)")
        return
    kinds = [name for name in names if name != "addition"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for color, name in zip(("tab:blue", "tab:orange", "tab:gray"), kinds):
        for seed in [
            seed for seed in seeds_of(name, seeds) if (output / f"{name}_seed{seed}.jsonl").exists()
        ]:
            lines = [
                line
                for line in read_jsonl(output / f"{name}_seed{seed}.jsonl")
                if "eval/score" in line
            ]
            for axis, key in zip(axes, PLOTTED):
                label = None if any(line.get_label() == name for line in axis.lines) else name
                axis.plot(
                    [line["step"] for line in lines],
                    [line[key] for line in lines],
                    color=color,
                    label=label,
                )
    for axis, title in zip(axes, PLOTTED.values()):
        axis.set(xlabel="rollouts", title=title)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output / "ppo.png", dpi=120)


def main() -> None:
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
            wait(jobs)  # one that fails does not take the others with it
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
    }
    write_json(
        args.output / "summary.json", {**record, "hardware": hardware(), "versions": versions()}
    )
    draw(args.output, list(runs), seeds)
    sys.exit(0 if all_met else 1)


if __name__ == "__main__":
    main()
