"""Peak memory and seconds of training steps on one GPU, with random weights of published shapes; no files, no hub.

    python scripts/bench_training_memory.py --output memory                 # every row, each in a process of its own
    python scripts/bench_training_memory.py --output memory --rows ppo-13b  # those whose name begins so
    python scripts/bench_training_memory.py --output memory --gpus 4 --rows ppo-7b-zero3-full sft-7b-zero3-full
    python scripts/bench_training_memory.py --output memory --tiny          # the same rows in miniature, on a CPU too

A row that fails or takes longer than --timeout_s does not stop the others. Writes ROW.json for each and prints a table.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.runtime.hardware import hardware  # noqa: E402
from dschat.runtime.ports import free_port  # noqa: E402
from scripts._memory_rows import ROWS, run_row  # noqa: E402


def main() -> int:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.row:
        result = run_row(args.row, tiny=args.tiny, rollouts=args.rollouts, ppo_flags=args.ppo_flags)
        if int(os.environ["RANK"]) == 0:
            (args.output / f"{args.row}.json").write_text(json.dumps(result, indent=1) + "\n")
        return 0
    asked = [name for name in ROWS if any(name.startswith(start) for start in args.rows)]
    if not asked:
        raise SystemExit(f"--rows {' '.join(args.rows)}: no such row; there are {', '.join(ROWS)}")
    names = [name for name in asked if args.tiny or not left_out(name, args.gpus)]
    if not args.tiny and any("--offload " in ROWS[name].flags for name in names):
        compile_cpu_adam()
    results = [attempt(name, args) for name in names]
    print(markdown(results))
    return int(not results or any("error" in result for result in results))


def left_out(name: str, gpus: int) -> bool:
    """Return whether a row needs more than there is, and print it."""
    row, found = ROWS[name], hardware()
    host_gib, gpus_gib = found["host_memory_gib"], gpus * found.get("gpu_memory_gib", 0)
    lacks = [f"{row.min_gpus_gib} GiB on all GPUs, of which there are {gpus_gib:.0f}"] * (
        row.min_gpus_gib > gpus_gib
    )
    lacks += [f"{row.min_host_gib} GiB of host memory, of which there are {host_gib:.0f}"] * (
        row.min_host_gib > host_gib
    )
    if lacks:
        print(f"{name}: left out, needs {' and '.join(lacks)}", flush=True)
    return bool(lacks)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help=f"beginnings of names; there are {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes a row, under the deepspeed launcher"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument(
        "--rollouts", type=int, default=2, help="steps (rollouts) a row; the last one is timed"
    )
    parser.add_argument(
        "--timeout_s", type=float, default=180, help="a row that takes longer is ended"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="miniature models of the same families, fp32, no cap"
    )
    parser.add_argument(
        "--ppo_flags",
        default="",
        help="more flags of step 3, as one word: --ppo_flags='--FLAG VALUE'",
    )
    parser.add_argument("--row", choices=tuple(ROWS), help="run this one row in this process")
    return parser.parse_args()


def compile_cpu_adam() -> None:
    """Compile DeepSpeed's CPU optimizer once, before any row is timed."""
    started = time.monotonic()
    code = "import deepspeed; deepspeed.ops.op_builder.CPUAdamBuilder().load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    state = "ready"
    if done.returncode != 0:
        state = f"cannot be compiled, rows with --offload will fail:\n{done.stderr[-1500:]}"
    print(f"DeepSpeedCPUAdam ({time.monotonic() - started:.0f} s): {state}", flush=True)


def attempt(name: str, args: argparse.Namespace) -> dict:
    """The row's result, or its name and error."""
    started = time.monotonic()
    file, log = args.output / f"{name}.json", args.output / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [
        *launcher(args.gpus),
        __file__,
        "--row",
        name,
        "--output",
        str(args.output),
        "--rollouts",
        str(args.rollouts),
    ]
    command.append(f"--ppo_flags={args.ppo_flags}")
    error = ""
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command + ["--tiny"] * args.tiny,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(args.timeout_s)
        except subprocess.TimeoutExpired:
            error = f"longer than {args.timeout_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of a launcher
            process.wait()
    if file.exists():
        result = json.loads(file.read_text())
    else:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
        if process.returncode < 0 and not error:
            error = f"ended by {signal.Signals(-process.returncode).name}"  # SIGKILL: host memory ran out, as a rule
        result = {"row": name, "error": error or (lines or ["ended without a result"])[-1][-300:]}
    result["process_s"] = round(time.monotonic() - started, 1)
    print(
        json.dumps(
            {key: value for key, value in result.items() if key not in ("hardware", "versions")}
        ),
        flush=True,
    )
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def launcher(processes: int) -> list[str]:
    """Return the command in front of a script; for several ranks the deepspeed launcher, on a free port."""
    if processes == 1:
        return [sys.executable]
    words = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(processes),
        "--master_port",
        str(free_port()),
    ]
    return [sys.executable, *words]


def markdown(results: list[dict]) -> str:
    """The table of docs/performance/memory.md."""
    lines = [
        "| row | peak GiB | loading | generating, scoring | updating | host GiB | seconds: load, generate, score, update "
        "| tokens/s |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for result in results:
        if "error" in result:
            lines.append(
                f"| {result['row']} | failed: {result['error'].replace('|', '/')} | | | | | | |"
            )
            continue
        gib = [
            f"{result['peak_gib'].get(phase, 0):.1f}"
            for phase in ("all", "load", "rollout", "update")
        ]
        seconds = [
            f"{result['seconds'].get(phase, 0):.1f}"
            for phase in ("load", "generate", "score", "update")
        ]
        lines.append(
            f"| {' | '.join([result['row'], *gib])} | {result['host_gib']:.1f} | {', '.join(seconds)} "
            f"| {result['tokens_per_s']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
