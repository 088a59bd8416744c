"""Compare the recipes of step 3 on a task whose answers can be checked.

    python scripts/reproduce_verifiable.py --output docs/results/verifiable [--model FOLDER]
    python scripts/reproduce_verifiable.py --tiny --output /tmp/tiny   # a miniature, on a CPU

The task is sums and word problems of two operations (verifiable_task.py). Step 1 first teaches the
model the form of an answer on a few solved problems, not all of which mark their result; then every
recipe trains from that model, each
with several seeds and with as many answers a rollout. results.jsonl holds one line for each run. A
run that it holds with the same flags and model is not repeated, so a run of this script that was
stopped continues with the same command. Writes table.md and, with matplotlib, verifiable.png.
Exits with 1 if a run is missing, or if a recipe does not gain three standard errors of accuracy.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.pipeline.summary import read_jsonl  # noqa: E402
from dschat.runtime.files import write_text  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from scripts._launches import fingerprints, flags_shown, run_step  # noqa: E402
from scripts._verifiable_report import draw, missed_bars, report  # noqa: E402
from scripts.verifiable_task import kind_of, write_data  # noqa: E402

STEP1 = ROOT / "training" / "step1_supervised_finetuning" / "main.py"
STEP3 = ROOT / "training" / "step3_rlhf_finetuning" / "main.py"
RECIPES = ROOT / "training" / "step3_rlhf_finetuning" / "training_scripts" / "recipes"
NAMES = ("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo")
# The recipes leave the number of answers to a prompt to the task; these compare with a group.
GROUPS = {"grpo": 16, "dr_grpo": 16, "dapo": 16, "gspo": 16, "rloo": 4, "reinforce_pp": 4}
# The penalty of long answers begins at a fifth of the limit before it.
OVERLONG_SHARE = 5


@dataclass(frozen=True)
class Setting:
    """The sizes of the comparison: of the task, of step 1 and of every run of step 3."""

    task: dict  # arguments of write_data
    sft_rows: int
    sft: str  # flags of step 1
    ppo: str  # flags of step 3
    rows: int  # rows for step 3
    answers: int  # answers a rollout
    max_answer_tokens: int


DEMO = Setting(
    task={
        "num_eval": 256,
        "largest": 20,
        "sum_share": 0.33,
        "with_steps": True,
        "unmarked_share": 0.4,
    },
    sft_rows=512,
    sft="--learning_rate 5e-5 --per_device_train_batch_size 32 --num_warmup_steps 2 "
    "--max_seq_len 96 --num_train_epochs 1 --per_device_eval_batch_size 64",
    ppo="--per_device_training_batch_size 64 --per_device_eval_batch_size 256 --eval_prompts 256 "
    "--max_prompt_seq_len 64 --actor_learning_rate 1e-5 --critic_learning_rate 2e-5 "
    "--num_warmup_steps 4 --lr_scheduler_type constant_with_warmup --max_train_steps 60 "
    "--eval_interval 4 --enable_hybrid_engine --no_compile",
    rows=16000,
    answers=256,
    max_answer_tokens=40,
)
TINY = Setting(
    task={
        "num_eval": 64,
        "largest": 3,
        "sum_share": 1.0,
        "with_steps": False,
        "unmarked_share": 0.5,
    },
    sft_rows=4096,
    sft="--learning_rate 3e-3 --per_device_train_batch_size 32 --num_warmup_steps 4 "
    "--max_seq_len 56 --max_train_steps 120 --per_device_eval_batch_size 64 --dtype fp32",
    ppo="--per_device_training_batch_size 64 --per_device_eval_batch_size 64 --eval_prompts 64 "
    "--max_prompt_seq_len 48 --actor_learning_rate 1e-3 --critic_learning_rate 3e-3 "
    "--num_warmup_steps 0 --lr_scheduler_type constant_with_warmup --max_train_steps 12 "
    "--eval_interval 4 --dtype fp32",
    rows=2048,
    answers=64,
    max_answer_tokens=12,  # an answer has 8, and the penalty of long ones begins after 10
)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for results, table and figure"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of the model; default: the one of the demo"
    )
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 3; 1 with --tiny")
    parser.add_argument(
        "--parallel", type=int, default=1, help="number of runs at a time; they share the GPU"
    )
    parser.add_argument(
        "--minutes", type=float, help="begin no run after so many; the same command continues"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="only write the table and the figure again"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a miniature model and task, minutes on a CPU"
    )
    args = parser.parse_args()
    args.seeds = args.seeds or ([1] if args.tiny else [1, 2, 3])
    return args


class Results:
    """The file of results: one line for each run, rewritten after each."""

    def __init__(self, file: Path):
        """Read `file` if it exists."""
        self.file = file
        self._lock = threading.Lock()
        self._lines = {}
        for line in read_jsonl(file) if file.exists() else []:
            self._lines[line["recipe"], line["seed"]] = line

    def has(self, recipe: str, seed: int, asked: dict) -> bool:
        """Return whether a run is in the file with the same flags and model."""
        line = self._lines.get((recipe, seed))
        return line is not None and line["asked"] == asked

    def add(self, line: dict) -> None:
        """Add a run, in place of an earlier one of the same recipe and seed."""
        with self._lock:
            self._lines[line["recipe"], line["seed"]] = line
            lines = [json.dumps(line) + "\n" for _, line in sorted(self._lines.items())]
            write_text(self.file, "".join(lines))

    def chosen(self, recipes: list[str], seeds: list[int]) -> list[dict]:
        """Return the lines of these recipes and seeds, in the order of the recipes."""
        keys = [(recipe, seed) for recipe in recipes for seed in seeds]
        return [self._lines[key] for key in keys if key in self._lines]


def base_model(args: argparse.Namespace) -> Path:
    """Return the folder of the model that step 1 begins from."""
    if args.tiny:
        from dschat.demo.tiny_models import make_tiny_model

        return make_tiny_model(args.output / "work" / "tiny", family="llama", std=0.08)
    if args.model is not None:
        return args.model.resolve()
    from dschat.demo.smollm2 import smollm2_folder

    return smollm2_folder()


def sft_model(base: Path, setting: Setting, work: Path, *, seed: int = 0) -> Path:
    """Return the model that has learned the form of answers; train it unless `work` has it."""
    folder = work / "sft"
    flags = setting.sft.split()
    asked = {"flags": setting.sft, "task": setting.task, "rows": setting.sft_rows}
    asked |= {"model": fingerprints(["--model", str(base)])}
    mark = work / "sft.json"
    if mark.exists() and json.loads(mark.read_text()) == asked:
        return folder
    mark.unlink(missing_ok=True)
    data = write_data(work / "sft_data", num_train=setting.sft_rows, seed=seed, **setting.task)
    print(f"step 1: {setting.sft_rows} solved problems", flush=True)
    words = ["--model_name_or_path", str(base), "--data_path", str(data), "--data_split", "1,0,0"]
    seconds = run_step(STEP1, [*words, *flags, "--output_dir", str(folder)], log=work / "sft.log")
    print(f"step 1: {seconds:.0f} s", flush=True)
    write_text(mark, json.dumps(asked))
    return folder


def recipe_options(recipe: str) -> dict:
    """Return the options of a recipe's file."""
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))


def run_flags(recipe: str, setting: Setting, model: Path, data: Path) -> list[str]:
    """Return the flags of a recipe's runs, without seed and output folder."""
    options = recipe_options(recipe)
    group = GROUPS.get(recipe, 1)
    words = ["--config", str(RECIPES / f"{recipe}.yaml"), "--actor_model_name_or_path", str(model)]
    if options["advantage_estimator"] == "gae":
        words += ["--critic_model_name_or_path", str(model)]
    words += ["--data_path", str(data), "--data_split", "0,0,1"]
    words += ["--reward_fn", f"{ROOT / 'scripts' / 'verifiable_task.py'}:reward"]
    words += ["--num_samples_per_prompt", str(group)]
    words += ["--per_device_generation_batch_size", str(setting.answers // group)]
    words += ["--max_answer_seq_len", str(setting.max_answer_tokens), *setting.ppo.split()]
    if not options["kl_coef"]:
        words += ["--kl_coef", "1e-9"]  # 0 would build no reference, which measures the KL
    if options.get("overlong_buffer"):
        words += ["--overlong_buffer", str(setting.max_answer_tokens // OVERLONG_SHARE)]
    return words


def train(recipe: str, seed: int, flags: list[str], work: Path) -> dict:
    """Run a recipe with one seed; return what results.jsonl keeps of it.

    Raises:
        RuntimeError: the run failed; the message names the log.
    """
    name = f"{recipe}_seed{seed}"
    print(f"{name}: started", flush=True)
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary) / name
        words = [*flags, "--seed", str(seed), "--output_dir", str(folder)]
        seconds = run_step(STEP3, words, log=work / f"{name}.log")
        return {"recipe": recipe, "seed": seed, "launch_seconds": seconds, **outcome(folder)}


def outcome(folder: Path) -> dict:
    """Return the curve of a run, its first and last held-out answers, and its seconds a rollout.

    Args:
        folder: the output folder of step 3.

    Returns:
        curve: of each evaluation its rollout, the rollouts and seconds spent until then (also those
            that dynamic sampling added), accuracy, KL and length.
        before, after: by kind of problem, a text with 1 for each right answer and 0 for each wrong.
        split: mean seconds a rollout, by part.
    """
    lines = read_jsonl(folder / "metrics.jsonl")
    files = sorted((folder / "evaluation").glob("rollout_*.jsonl"))
    trained = [line for line in lines if "time/train_s" in line]
    parts = ("generate", "score", "train")
    split = {part: sum(line[f"time/{part}_s"] for line in trained) / len(trained) for part in parts}
    return {
        "curve": list(_curve(lines)),
        "before": _right(read_jsonl(files[0])),
        "after": _right(read_jsonl(files[-1])),
        "split": split,
    }


def _curve(lines: list[dict]) -> Iterator[dict]:
    rollouts = 0.0
    seconds = 0.0
    for line in lines:
        if "time/train_s" in line:
            rollouts += 1 + line.get("rollout/extra_rollouts", 0)
            seconds += sum(line[f"time/{part}_s"] for part in ("generate", "score", "train"))
        if "eval/score" in line:
            yield {
                "rollout": line["step"],
                "sampled_rollouts": rollouts,
                "seconds": round(seconds, 2),
                "accuracy": line["eval/score"],
                "kl": line["eval/kl"],
                "length": line["eval/length"],
            }


def _right(rows: list[dict]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows:
        kind = kind_of(row["prompt"])
        found[kind] = found.get(kind, "") + str(int(row["score"] == 1))
    return found


def run_missing(args: argparse.Namespace, setting: Setting, results: Results) -> list[str]:
    """Run what `results` does not hold, and return the errors of runs that failed."""
    started = time.monotonic()
    work = args.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    base = base_model(args)
    task = write_data(work / "data", num_train=setting.rows, seed=1, **setting.task)
    common = {
        "task": setting.task,
        "sft_rows": setting.sft_rows,
        "sft": setting.sft,
        "model": fingerprints(["--model", str(base)]),
    }
    todo = []
    for seed in args.seeds:
        for recipe in args.recipes:
            flags = run_flags(recipe, setting, work / "sft", task)
            asked = {**common, "flags": flags_shown(flags), "recipe": recipe_options(recipe)}
            if not results.has(recipe, seed, asked):
                todo.append((recipe, seed, flags, asked))
    print(f"{len(args.seeds) * len(args.recipes)} runs, {len(todo)} to do", flush=True)
    if not todo:
        return []
    sft_model(base, setting, work)
    machine = {"hardware": hardware(), "versions": versions(), "parallel": args.parallel}

    def job(recipe: str, seed: int, flags: list[str], asked: dict) -> None:
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            return
        line = train(recipe, seed, flags, work)
        results.add({**line, "asked": asked, **machine})
        first, last = line["curve"][0], line["curve"][-1]
        print(
            f"{recipe}_seed{seed}: {line['launch_seconds']:.0f} s, accuracy "
            f"{first['accuracy']:.3f} -> {last['accuracy']:.3f}",
            flush=True,
        )

    errors = []
    with ThreadPoolExecutor(args.parallel) as pool:
        for done in as_completed([pool.submit(job, *run) for run in todo]):
            try:
                done.result()
            except (RuntimeError, OSError, KeyError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                print(errors[-1], flush=True)
    return errors


def main() -> int:
    """Run what is missing, write the report, and return 1 if a run or a gain is missing."""
    args = parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / "results.jsonl")
    errors = []
    if not args.report_only:
        errors = run_missing(args, TINY if args.tiny else DEMO, results)
    lines = results.chosen(args.recipes, args.seeds)
    missing = len(args.recipes) * len(args.seeds) - len(lines)
    if missing:
        print(f"{missing} runs are missing; the same command runs them", flush=True)
    if not lines:
        return 1
    text = report(lines)
    write_text(args.output / "table.md", text)
    print("\n" + text, flush=True)
    draw(lines, args.output / "verifiable.png")
    missed = missed_bars(lines)
    for recipe in missed:
        print(f"{recipe}: the gain is below three standard errors")
    return int(bool(errors or missing or missed))


if __name__ == "__main__":
    sys.exit(main())
