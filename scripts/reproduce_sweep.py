"""The sweep of step 3 over ZeRO stage, Hybrid Engine, offload and LoRA on a miniature OPT, 200 rollouts a run, and its figure.

    python scripts/reproduce_sweep.py --output docs/results/sweep --parallel 8

Trains the miniature's SFT and reward model on toy remarks, then starts run_single.sh of the sweep for each combination; those
with LoRA three times: the adapters with a learning rate of their own, and adapters and weights with one shared rate, the
lower and the higher of the two. sweep.json holds score and KL of every rollout, sweep.png draws the scores (matplotlib). A run that
sweep.json holds with the same flags is not run again. Exits 1 where a run fails.
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
from dschat.runtime.hardware import hardware, versions
from dschat.tracking.table import table
from scripts.bench_training_memory import compile_cpu_adam  # noqa: E402
from scripts.plot_sweep import NAME, STAGES, SWITCH, draw, summary  # noqa: E402
from scripts.reproduce_ppo import has_gpu  # noqa: E402

SINGLE = (
    ROOT / "training/step3_rlhf_finetuning/training_scripts/opt/single_node/sweep/run_single.sh"
)
WEIGHTS, ADAPTERS = "1e-3", "5e-3"
# Title: learning rates of the weights and of the adapters.
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
    "--per_device_training_batch_size 32 --max_prompt_seq_len 32 --max_answer_seq_len 16 --critic_learning_rate 1e-3 "
    "--num_warmup_steps 0 --lr_scheduler_type constant_with_warmup --eval_prompts 32 --num_train_epochs 100 --no_compile "
    "--per_device_eval_batch_size 32"
)
LORA = "--actor_lora_dim 16 --actor_lora_alpha 16"


def main() -> int:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "sweep.json"
    known = json.loads(file.read_text())["runs"] if file.exists() else {}
    todo = [
        run
        for run in every_run()
        if known.get(label(*run), {}).get("flags") != shown_flags(*run, args)
    ]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of sweep.json, sweep.png and failed runs' logs",
    )
    parser.add_argument("--rollouts", type=int, default=200, help="rollouts a run")
    parser.add_argument(
        "--parallel", type=int, default=1, help="runs at a time, which share the GPU"
    )
    parser.add_argument(
        "--smooth", type=int, default=10, help="rollouts of the figure's moving average"
    )
    return parser.parse_args()


def command(args: argparse.Namespace) -> str:
    """The command line without this machine's paths."""
    words = f"--output {args.output.name} --rollouts {args.rollouts} --parallel {args.parallel}"
    return f"python scripts/{Path(__file__).name} {words}"


def every_run() -> list[tuple[str, str]]:
    """(key of RATES or "", folder name) of all runs: sixteen, and those with LoRA again at shared rates."""
    names = [NAME.format(*values) for values in itertools.product(STAGES, SWITCH, SWITCH, SWITCH)]
    plain = [("", name) for name in names if name.endswith("lora_false")]
    return plain + [
        (rates, name) for rates in RATES for name in names if name.endswith("lora_true")
    ]


def label(rates: str, name: str) -> str:
    return f"{rates}/{name}" if rates else name


def train_models(work: Path) -> Path:
    """The output folder of steps 1 and 2 on the miniature OPT."""
    words = [
        sys.executable,
        str(ROOT / "e2e_rlhf.py"),
        "--actor-model",
        "tiny-opt",
        "--reward-model",
        "tiny-opt",
    ]
    subprocess.run([*words, "--step", "1", "2", "--output-dir", str(work / "models")], check=True)
    return work / "models"


def shown_flags(rates: str, name: str, args: argparse.Namespace) -> str:
    """A run's flags after those that its folder's name tells."""
    weights, adapters = RATES[rates or "separate"]
    words = f"{FLAGS} --max_train_steps {args.rollouts} --actor_learning_rate {weights}"
    return (
        f"{words} {LORA} --actor_lora_learning_rate {adapters}"
        if name.endswith("lora_true")
        else words
    )


def launch(rates: str, name: str, models: Path, work: Path, args: argparse.Namespace) -> dict:
    """One run: its flags, seconds, hardware, and scores and KLs, a value a rollout.

    Raises:
        RuntimeError: it failed; names the log.
    """
    stage, hybrid, offload, lora = name[1:].split("_")[::2]
    folder = work / label(rates, name)
    words = [
        models / "actor-models/opt",
        models / "reward-models/opt",
        stage,
        stage,
        hybrid,
        offload,
        lora,
        "false",
        folder,
    ]
    words += ["--data_path", models / "toy-data", *shown_flags(rates, name, args).split()]
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
    kept = {"score": "objective/score", "kl": "objective/kl"}
    machine = hardware()
    facts = {
        "flags": shown_flags(rates, name, args),
        "hardware": machine.get("gpu", f"{machine['cpu']}, {machine['cpu_cores']} cores"),
        "versions": {name: versions()[name] for name in ("torch", "deepspeed", "transformers")},
        "seconds": round(seconds, 1),
    }
    return {**facts, **{key: [round(line[m], 4) for line in lines] for key, m in kept.items()}}


def report(runs: dict[str, dict], figure: Path, window: int) -> None:
    """A table of the runs, and the figure: a panel without LoRA, one for each pair of rates."""
    panels = {}
    for rates, title in TITLES.items():
        names = [
            name for found, name in every_run() if found == rates and label(found, name) in runs
        ]
        if names:
            panels[title] = {
                name: list(enumerate(runs[label(rates, name)]["score"], start=1)) for name in names
            }
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
