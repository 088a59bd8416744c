"""Measure peak memory and seconds of training, with random weights of published shapes.

    python scripts/bench_training_memory.py --output memory                 # all rows
    python scripts/bench_training_memory.py --output memory --rows ppo-13b  # names that begin so
    python scripts/bench_training_memory.py --output memory --gpus 4 --rows ppo-7b-zero3-full
    python scripts/bench_training_memory.py --output memory --tiny          # miniatures, on a CPU

No model files and no hub are needed. Each row runs in a separate process. A row that fails or takes
longer than --timeout_s does not stop the others. Writes ROW.json for each row and prints a table.
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
    """Measure the rows and print the table; return 1 if a row fails or none fits."""
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
    """Return whether a row needs more memory than there is, and print it."""
    row = ROWS[name]
    found = hardware()
    host_gib = found["host_memory_gib"]
    gpus_gib = gpus * found.get("gpu_memory_gib", 0)
    needs = []
    if row.min_gpus_gib > gpus_gib:
        needs.append(f"{row.min_gpus_gib} GiB on all GPUs, of which there are {gpus_gib:.0f}")
    if row.min_host_gib > host_gib:
        needs.append(f"{row.min_host_gib} GiB of host memory, of which there are {host_gib:.0f}")
    if needs:
        print(f"{name}: left out, needs {' and '.join(needs)}", flush=True)
    return bool(needs)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help=f"beginnings of names: {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="ranks of each row, under the deepspeed launcher"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument(
        "--rollouts",
        type=int,
        default=2,
        help="updates (step 3: rollouts) of each row; the last is timed",
    )
    parser.add_argument("--timeout_s", type=float, default=180, help="end a row that takes longer")
    parser.add_argument(
        "--tiny", action="store_true", help="miniature models of the same families, fp32, no cap"
    )
    parser.add_argument(
        "--ppo_flags",
        default="",
        help="further flags of step 3, as one word: --ppo_flags='--FLAG VALUE'",
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
        state = f"cannot be compiled; rows with --offload will fail:\n{done.stderr[-1500:]}"
    print(f"DeepSpeedCPUAdam ({time.monotonic() - started:.0f} s): {state}", flush=True)


def attempt(name: str, args: argparse.Namespace) -> dict:
    """Measure a row in a separate process; return its result, or its name and error."""
    started = time.monotonic()
    file = args.output / f"{name}.json"
    log = args.output / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [*launcher(args.gpus), __file__, "--row", name, "--output", str(args.output)]
    command += ["--rollouts", str(args.rollouts), f"--ppo_flags={args.ppo_flags}"]
    if args.tiny:
        command.append("--tiny")
    error = ""
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(args.timeout_s)
        except subprocess.TimeoutExpired:
            error = f"longer than {args.timeout_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # and the launcher's ranks
            process.wait()
    if file.exists():
        result = json.loads(file.read_text())
    else:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
        if process.returncode < 0 and not error:
            # SIGKILL usually means that the host's memory ran out.
            error = f"ended by {signal.Signals(-process.returncode).name}"
        if not error:
            error = lines[-1][-300:] if lines else "ended without a result"
        result = {"row": name, "error": error}
    result["process_s"] = round(time.monotonic() - started, 1)
    shown = {key: value for key, value in result.items() if key not in ("hardware", "versions")}
    print(json.dumps(shown), flush=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def launcher(processes: int) -> list[str]:
    """Return the command that starts a script; for several ranks the deepspeed launcher."""
    if processes == 1:
        return [sys.executable]
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--num_accelerators", str(processes), "--master_port", str(free_port())]
    return command


def markdown(results: list[dict]) -> str:
    """Return the table of docs/performance/memory.md."""
    lines = [
        "| row | peak GiB | loading | generating, scoring | updating | host GiB "
        "| seconds: load, generate, score, update | tokens/s |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for result in results:
        if "error" in result:
            error = result["error"].replace("|", "/")
            lines.append(f"| {result['row']} | failed: {error} | | | | | | |")
            continue
        peaks, seconds = result["peak_gib"], result["seconds"]
        phases = ("load", "generate", "score", "update")
        cells = [
            result["row"],
            *(f"{peaks.get(phase, 0):.1f}" for phase in ("all", "load", "rollout", "update")),
            f"{result['host_gib']:.1f}",
            ", ".join(f"{seconds.get(phase, 0):.1f}" for phase in phases),
            f"{result['tokens_per_s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
