"""Compare predicted and measured peak memory of training runs on one GPU.

    python scripts/bench_memory.py --output memory.json            # all cases; they fit 80 GB
    python scripts/bench_memory.py --only sft-opt-1.3b-z2 ppo-opt-1.3b-z2
    python scripts/bench_memory.py --tiny                          # miniature shapes, on a CPU too

Each case runs the main of its step in a separate process, on random weights of a published shape
and on texts that fill every row, for two updates (step 3: two rollouts). The prediction is the
memory plan of dschat/memory/plan.py for the same flags. A case that fails is reported, and the
others continue.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_memory_case import measure  # noqa: E402

from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402

GIB = 2**30
TAIL_LINES = 40


@dataclass(frozen=True)
class Case:
    """One run of a step's main."""

    step: int
    models: tuple[str, ...]  # published shapes: the model, or actor and critic
    flags: str


CASES = {
    "sft-opt-1.3b-z2": Case(1, ("opt-1.3b",), "--zero_stage 2 --per_device_train_batch_size 16"),
    "sft-llama-2-7b-lora": Case(
        1, ("llama-2-7b",), "--lora_dim 64 --only_optimize_lora --per_device_train_batch_size 4"
    ),
    "ppo-opt-1.3b-z2": Case(
        3,
        ("opt-1.3b", "opt-350m"),
        "--actor_zero_stage 2 --critic_zero_stage 2 --max_answer_seq_len 256 "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 16",
    ),
    "sft-opt-2.7b-z0-checkpointing": Case(
        1, ("opt-2.7b",), "--zero_stage 0 --gradient_checkpointing --per_device_train_batch_size 8"
    ),
    "rm-opt-1.3b-z3": Case(
        2, ("opt-1.3b",), "--zero_stage 3 --gradient_checkpointing --per_device_train_batch_size 16"
    ),
    "rm-opt-350m-z0": Case(2, ("opt-350m",), "--zero_stage 0 --per_device_train_batch_size 16"),
    "ppo-opt-1.3b-z3": Case(
        3,
        ("opt-1.3b", "opt-350m"),
        "--actor_zero_stage 3 --critic_zero_stage 3 --max_answer_seq_len 32 "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 16 "
        "--actor_gradient_checkpointing --critic_gradient_checkpointing",
    ),
    "ppo-llama-2-7b-lora": Case(
        3,
        ("llama-2-7b", "opt-1.3b"),
        "--actor_lora_dim 64 --critic_lora_dim 64 --only_optimize_lora "
        "--actor_gradient_checkpointing --max_answer_seq_len 128 "
        "--per_device_generation_batch_size 8 --per_device_training_batch_size 8",
    ),
    "sft-opt-1.3b-z2-offload": Case(
        1, ("opt-1.3b",), "--zero_stage 2 --offload --no_pin_memory --per_device_train_batch_size 8"
    ),
    "sft-llama-2-7b-lora-z3-offload": Case(
        1,
        ("llama-2-7b",),
        "--zero_stage 3 --offload --no_pin_memory --lora_dim 64 --only_optimize_lora "
        "--gradient_checkpointing --per_device_train_batch_size 8",
    ),
}

# Further flags with --tiny, so that a CPU is not busy for long.
TINY_FLAGS = {
    1: "--per_device_train_batch_size 4",
    2: "--per_device_train_batch_size 4",
    3: "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 "
    "--max_answer_seq_len 32",
}


def main() -> None:
    """Run the cases and print the table; exit with 1 if one fails."""
    args = parse_args()
    if args.one:
        case = CASES[args.one]
        tiny = TINY_FLAGS[case.step] if args.tiny else ""
        flags = f"{case.flags} {tiny} --dtype {args.dtype} {args.more}"
        result = measure(case.step, case.models, flags, tiny=args.tiny)
        Path(args.result).write_text(json.dumps(result))
        return
    started = time.monotonic()
    results: list[dict] = []
    for name in args.only or CASES:
        if time.monotonic() - started > args.budget_s:
            results.append({"case": name, "error": f"not run: {args.budget_s:.0f} s were over"})
            continue
        results.append(run_apart(name, args))
        print(line(results[-1]), flush=True)
        save(results, args.output)  # a later case may take the machine down
    print("\n" + "\n".join(line(result) for result in results))
    good = [result for result in results if "error" not in result]
    if good:
        worst = max(abs(result["relative_error"]) for result in good)
        print(f"{len(good)} of {len(results)} cases ran; largest error {100 * worst:.1f}%")
    save(results, args.output)
    sys.exit(0 if len(good) == len(results) else 1)


def save(results: list[dict], output: str | None) -> None:
    """Write the results to the file `output`, if given."""
    if output:
        write_json(output, {"cases": results, "hardware": hardware(), "versions": versions()})


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        metavar="CASE",
        help=f"run only these of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use miniature shapes instead of the published ones"
    )
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument(
        "--budget_s", type=float, default=300.0, help="start no case after this many seconds"
    )
    parser.add_argument(
        "--timeout_s", type=float, default=120.0, help="kill a case after this many seconds"
    )
    parser.add_argument("--more", default="", help="further flags for every case, as one word")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(name: str, args: argparse.Namespace) -> dict:
    """Run a case in a separate process; return its result, or its error if it fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench_memory.") as folder:
        path = Path(folder) / "result.json"
        log = Path(folder) / "log"
        command = [sys.executable, __file__, "--one", name, "--result", str(path)]
        command += ["--dtype", args.dtype, f"--more={args.more}"]
        if args.tiny:
            command.append("--tiny")
        with open(log, "w") as file:
            try:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=args.timeout_s,
                    stdin=subprocess.DEVNULL,
                )
                status = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                status = f"killed after {args.timeout_s:.0f} s"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        found = json.loads(path.read_text()) if path.exists() else {"error": f"{status}\n{tail}"}
    return {"case": name, **found, "seconds": time.monotonic() - started}


def line(result: dict) -> str:
    """Return a case's line of the table."""
    if "error" in result:
        return f"{result['case']:34} {result['error']}"
    predicted = result["predicted"] / GIB
    measured = result["measured"] / GIB
    return (
        f"{result['case']:34} predicted {predicted:7.2f}  measured {measured:7.2f} GiB  "
        f"error {100 * result['relative_error']:+6.1f}%  "
        f"({result['predicted_phase']}; {result['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
