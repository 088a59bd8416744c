"""Run the sweep of step 3 over ZeRO stage, Hybrid Engine, offload and LoRA, and draw its figure.

    python scripts/reproduce_sweep.py --output docs/results/sweep --parallel 8

Trains the SFT and reward model of a miniature OPT on toy remarks, then starts run_single.sh of the
sweep for each combination, 200 rollouts each. Combinations with LoRA run three times: with separate
learning rates of adapters and weights, and with one rate for both, the lower and the higher of the
two. sweep.json holds score and KL of every rollout; sweep.png shows the scores (it needs
matplotlib). A run that sweep.json holds with the same flags is not repeated. Exits with 1 if a run
fails.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.pipeline.summary import read_jsonl  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.tracking.table import table  # noqa: E402
from scripts._launches import has_gpu  # noqa: E402
from scripts.bench_training_memory import compile_cpu_adam  # noqa: E402
from scripts.plot_sweep import NAME, STAGES, SWITCH, draw, summary  # noqa: E402

SINGLE = (
    ROOT / "training/step3_rlhf_finetuning/training_scripts/opt/single_node/sweep/run_single.sh"
)
WEIGHTS = "1e-3"
ADAPTERS = "5e-3"
# The learning rates of the weights and of the adapters.
RATES = {
    "separate": (WEIGHTS, ADAPTERS),
    "shared-low": (WEIGHTS, WEIGHTS),
    "shared-high": (ADAPTERS, ADAPTERS),
}
TITLES = {
    "": "without LoRA",
    "separate": f"LoRA: adapters {ADAPTERS}, weights {WEIGHTS}",
    "shared-low": f"LoRA: adapters and weights {WEIGHTS}",
    "shared-high": f"LoRA: adapters and weights {ADAPTERS}",
}
FLAGS = (
    "--data_split 0,0,1 --num_padding_at_beginning 0 --per_device_generation_batch_size 32 "
    "--per_device_training_batch_size 32 --max_prompt_seq_len 32 --max_answer_seq_len 16 "
    "--critic_learning_rate 1e-3 --num_warmup_steps 0 --lr_scheduler_type constant_with_warmup "
    "--eval_prompts 32 --num_train_epochs 100 --no_compile --per_device_eval_batch_size 32"
)
LORA = "--actor_lora_dim 16 --actor_lora_alpha 16"


def main() -> int:
    """Run what sweep.json does not hold; return 1 if a run fails."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "sweep.json"
    known = json.loads(file.read_text())["runs"] if file.exists() else {}
    todo = []
    for run in all_runs():
        if known.get(label(*run), {}).get("flags") != run_flags(*run, args):
            todo.append(run)
    failed = []
    if todo:
        with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.parallel) as pool:
            models = train_models(Path(work))
            if has_gpu():
                compile_cpu_adam()
            jobs = {pool.submit(launch, *run, models, Path(work), args): run for run in todo}
            for job in as_completed(jobs):
                run = jobs[job]
                try:
                    known[label(*run)] = job.result()
                except (RuntimeError, OSError, KeyError) as error:
                    failed.append(f"{label(*run)}: {error}")
                write_json(file, {"command": command(args), "runs": known})
    for error in failed:
        print(error)
    report(known, args.output / "sweep.png", args.smooth)
    return int(bool(failed))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for sweep.json, sweep.png and the logs of failed runs",
    )
    parser.add_argument("--rollouts", type=int, default=200, help="rollouts of each run")
    parser.add_argument(
        "--parallel", type=int, default=1, help="number of runs at a time; they share the GPU"
    )
    parser.add_argument(
        "--smooth", type=int, default=10, help="length of the figure's moving average, in rollouts"
    )
    return parser.parse_args()


def command(args: argparse.Namespace) -> str:
    """Return the command line without this machine's paths."""
    words = f"--output {args.output.name} --rollouts {args.rollouts} --parallel {args.parallel}"
    return f"python scripts/{Path(__file__).name} {words}"


def all_runs() -> list[tuple[str, str]]:
    """Return (key of RATES or "", folder name) of each run.

    There are eight without LoRA, and eight with LoRA for each entry of RATES.
    """
    names = [NAME.format(*values) for values in itertools.product(STAGES, SWITCH, SWITCH, SWITCH)]
    plain = [("", name) for name in names if name.endswith("lora_false")]
    with_lora = [(rates, name) for rates in RATES for name in names if name.endswith("lora_true")]
    return plain + with_lora


def label(rates: str, name: str) -> str:
    """Return a run's key in sweep.json."""
    return f"{rates}/{name}" if rates else name


def train_models(work: Path) -> Path:
    """Run steps 1 and 2 on the miniature OPT and return their output folder."""
    words = "--actor-model tiny-opt --reward-model tiny-opt --step 1 2 --output-dir".split()
    folder = work / "models"
    subprocess.run([sys.executable, str(ROOT / "e2e_rlhf.py"), *words, str(folder)], check=True)
    return folder


def run_flags(rates: str, name: str, args: argparse.Namespace) -> str:
    """Return a run's flags, without those that its folder's name tells."""
    weights, adapters = RATES[rates or "separate"]
    flags = f"{FLAGS} --max_train_steps {args.rollouts} --actor_learning_rate {weights}"
    if name.endswith("lora_true"):
        flags += f" {LORA} --actor_lora_learning_rate {adapters}"
    return flags


def launch(rates: str, name: str, models: Path, work: Path, args: argparse.Namespace) -> dict:
    """Run one combination; return its flags, seconds, hardware, and score and KL of each rollout.

    Raises:
        RuntimeError: the run failed; the message names the log.
    """
    stage, hybrid, offload, lora = name[1:].split("_")[::2]
    flags = run_flags(rates, name, args)
    folder = work / label(rates, name)
    # run_single.sh takes the models, the ZeRO stages, the switches and the output folder.
    words = [models / "actor-models/opt", models / "reward-models/opt", stage, stage]
    words += [hybrid, offload, lora, "false", folder]
    words += ["--data_path", models / "toy-data", *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    started = time.monotonic()
    log = args.output / f"{label(rates, name).replace('/', '_')}.log"
    with open(log, "w", encoding="utf-8") as stream:
        done = subprocess.run(
            ["bash", str(SINGLE), *map(str, words)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"{label(rates, name)} failed; see {log}")
    log.unlink()
    seconds = time.monotonic() - started
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "objective/score" in line]
    print(f"{label(rates, name)}: {seconds:.0f} s, {len(lines)} rollouts", flush=True)
    machine = hardware()
    found = versions()
    return {
        "flags": flags,
        "hardware": machine.get("gpu", f"{machine['cpu']}, {machine['cpu_cores']} cores"),
        "versions": {package: found[package] for package in ("torch", "deepspeed", "transformers")},
        "seconds": round(seconds, 1),
        "score": [round(line["objective/score"], 4) for line in lines],
        "kl": [round(line["objective/kl"], 4) for line in lines],
    }


def report(runs: dict[str, dict], figure: Path, window: int) -> None:
    """Print a table of the runs and draw the figure.

    The figure has a panel without LoRA and one for each entry of RATES.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for rates, name in all_runs():
        if label(rates, name) in runs:
            curve = list(enumerate(runs[label(rates, name)]["score"], start=1))
            panels.setdefault(TITLES[rates], {})[name] = curve
    if not panels:
        return
    rows = [
        [title, name, *summary(curve)]
        for title, panel in panels.items()
        for name, curve in panel.items()
    ]
    print(table(rows, header=["", "run", "rollouts", "first", "last", "highest"]))
    draw(panels, figure, metric="objective/score", window=window)


if __name__ == "__main__":
    sys.exit(main())
