"""Disturb supervised runs of all steps at random, and compare them with unbroken runs.

    python scripts/soak.py --minutes 60 --output docs/results/soak.json
    python scripts/soak.py --faults 30 --steps sft --ranks 2

Miniature models are trained with --max_restarts (docs/checkpoints.md). At random times a rank or
the launcher is killed, a rank is stopped so that the run hangs, the newest checkpoint is damaged
before a kill, or the files of a rank get a size limit, as on a full disk. Each run must end by
itself with the weights and metrics of an unbroken run, to the bit; times are left out. A run that
its supervisor has given up, because the same fault came again and again, is started once more
with --resume latest, and counted.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.demo.tiny_models import make_tiny_model  # noqa: E402
from dschat.demo.toy import write_toy_data  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.runtime.ports import free_port  # noqa: E402

UPDATES = 60
SUPERVISED = (
    "--model_name_or_path {models}/opt --dropout 0.1 --max_seq_len 48 --learning_rate 1e-2 "
    "--per_device_train_batch_size 4 --zero_stage 2 "
)
PPO = (
    "--actor_model_name_or_path {models}/llama --reward_fn {models}/rewards.py:letters "
    "--advantage_estimator rloo --num_samples_per_prompt 2 "
    "--max_prompt_seq_len 24 --max_answer_seq_len 6 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4 --eval_prompts 4 --data_split 0,0,1 "
)
STEPS = {
    "sft": ("step1_supervised_finetuning", SUPERVISED + "--data_split 1,0,0 "),
    "reward": ("step2_reward_model_finetuning", SUPERVISED + "--data_split 0,1,0 "),
    "dpo": ("step2_dpo_finetuning", SUPERVISED + "--data_split 0,1,0 "),
    "ppo": ("step3_rlhf_finetuning", PPO),
}
SHARED = "--data_path {models}/toy --dtype fp32 --max_train_steps {updates} --save_interval 4 "
RESTARTS = "--max_restarts 100 --restart_delay_s 0 --hang_timeout_s {hang_s} "
REWARD = """
def letters(prompts, answers, **columns):
    return [float(len(answer)) for answer in answers]
"""
DISK_BYTES = 50_000  # largest file of a rank whose disk is full
RUN_S = 3600.0  # a run that takes longer has failed


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    step: str  # a key of STEPS
    ranks: int
    background: bool  # --background_save

    @property
    def name(self) -> str:
        """The name of the case's folders."""
        return f"{self.step}-{self.ranks}" + ("-background" if self.background else "")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after these")
    parser.add_argument("--faults", type=int, default=0, help="stop after so many; 0: no limit")
    parser.add_argument("--faults_per_run", type=int, default=5)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--hang_s", type=float, default=90.0, help="longest time without an update")
    parser.add_argument("--longest_wait_s", type=float, default=8.0, help="between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: only print")
    return parser.parse_args()


def command_of(case: Case, folder: Path, out: Path, *, flags: str) -> list[str]:
    """Return the command of a run; with --max_restarts in `flags` it is supervised."""
    main_folder, own_flags = STEPS[case.step]
    places = dict(models=folder / "models", updates=UPDATES)
    words = [str(ROOT / "training" / main_folder / "main.py"), "--output_dir", str(out)]
    words += (own_flags + SHARED + flags).format(**places).split()
    if case.background:
        words.append("--background_save")
    if case.ranks == 1:
        supervisor = ["-m", "dschat.supervise", sys.executable] if flags else []
        return [sys.executable, *supervisor, *words]
    launcher = ["-m", "dschat.engine.deepspeed_runner", "--hostfile", ""]
    launcher += ["--num_accelerators", str(case.ranks), "--master_port", str(free_port())]
    return [sys.executable, *launcher, *words]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a command with its output appended to `log`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**quiet, **os.environ, "PYTHONPATH": path},
        )


def processes_of(run: subprocess.Popen, word: str) -> list[psutil.Process]:
    """Return the processes of a run whose command has `word`, and none of their parents' words."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(process.cmdline()[:4]):
                    found.append(process)
    return found


def inject(kind: str, run: subprocess.Popen, out: Path, draw: random.Random) -> bool:
    """Disturb a run; return whether there was something to disturb."""
    ranks = processes_of(run, "main.py")
    if not ranks:
        return False
    rank = draw.choice(ranks)
    with contextlib.suppress(psutil.NoSuchProcess):
        if kind == "kill a rank":
            rank.kill()
        elif kind == "kill the launcher":
            (processes_of(run, "deepspeed_launch") or [rank])[0].kill()
        elif kind == "stop a rank":
            rank.suspend()
        elif kind == "fill the disk":
            rank.rlimit(psutil.RLIMIT_FSIZE, (DISK_BYTES, resource.RLIM_INFINITY))
        elif kind == "damage a checkpoint":
            if not damage_newest(out / "checkpoints", draw):
                return False
            rank.kill()
        return True
    return False


FAULTS = ("kill a rank", "kill the launcher", "stop a rank", "fill the disk", "damage a checkpoint")


def damage_newest(root: Path, draw: random.Random) -> bool:
    """Flip a bit of a file of the newest checkpoint; return whether there was one with another."""
    folders = sorted(root.glob("step_*"))
    if len(folders) < 2:
        return False
    files = [file for file in folders[-1].rglob("*") if file.is_file() and file.stat().st_size]
    if not files:
        return False
    file = draw.choice(sorted(files))
    with contextlib.suppress(OSError):  # the run has just deleted it
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1
        file.write_bytes(data)
        return True
    return False


def disturbed(
    case: Case, folder: Path, *, args: argparse.Namespace, draw: random.Random, left: int
) -> tuple[Path, Counter]:
    """Run a case with up to --faults_per_run faults.

    Returns:
        Its output folder, and counts of faults by kind, "restarts" and "given up".
    """
    out = folder / "disturbed"
    log = folder / "log"
    flags = RESTARTS.format(hang_s=args.hang_s)
    run = start(command_of(case, folder, out, flags=flags), log)
    counts: Counter = Counter()
    deadline = time.monotonic() + RUN_S
    planned = min(args.faults_per_run, left)
    try:
        while True:
            wait_s = draw.uniform(0.2, args.longest_wait_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(wait_s if planned else max(1.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                raise RuntimeError(f"{case.name}: no end after {RUN_S:.0f} s; see {log}")
            if run.poll() == 0:
                return out, counts
            if run.poll() is not None:
                if not counts or counts["given up"] > args.faults_per_run:
                    raise RuntimeError(f"{case.name}: ended {run.returncode}; see {log}")
                counts["given up"] += 1
                again = flags + "--resume latest"
                run = start(command_of(case, folder, out, flags=again), log)
            elif planned and (out / ".heartbeat").exists():
                kind = draw.choice(FAULTS)
                if inject(kind, run, out, draw):
                    counts[kind] += 1
                    planned -= 1
    finally:
        for process in [*processes_of(run, ""), *([run] if run.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def results(out: Path) -> dict[str, bytes]:
    """Return the bytes of the saved models, and of the metrics without times."""
    files = sorted(out.glob("**/model*.safetensors"))
    found = {str(file.relative_to(out)): file.read_bytes() for file in files}
    lines = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        lines.append({key: values[key] for key in values if key[:5] not in ("time/", "perf/")})
    return {**found, "metrics.jsonl": json.dumps(lines).encode()}


def compare(ours: dict[str, bytes], theirs: dict[str, bytes]) -> tuple[int, int]:
    """Return the number of bytes compared, and how many of them differ."""
    compared = differing = 0
    for name in ours.keys() | theirs.keys():
        one, other = ours.get(name, b""), theirs.get(name, b"")
        compared += max(len(one), len(other))
        if one != other:
            differing += abs(len(one) - len(other))
            differing += sum(a != b for a, b in zip(one, other, strict=False))
    return compared, differing


def soak(args: argparse.Namespace) -> dict:
    """Disturb runs until the time or the faults are used up; return the figures."""
    draw = random.Random(args.seed)
    cases = [
        Case(step, ranks, background)
        for background in (False, True)
        for ranks in args.ranks
        for step in args.steps
    ]
    totals: Counter = Counter()
    kinds: Counter = Counter()
    whole: dict[Case, dict[str, bytes]] = {}
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="dschat_soak_") as name:
        folder = Path(name)
        write_toy_data(folder / "models" / "toy", num_train=64, num_eval=16)
        (folder / "models" / "rewards.py").write_text(REWARD)
        for family in ("opt", "llama"):
            make_tiny_model(folder / "models" / family, family=family)
        number = 0
        while time.monotonic() < ends:
            left = args.faults - sum(kinds.values()) if args.faults else args.faults_per_run
            if left <= 0:
                break
            case = cases[number % len(cases)]
            number += 1
            if case not in whole:
                out = folder / case.name
                start(command_of(case, folder, out, flags=""), folder / "log").wait()
                whole[case] = results(out)
            out, counts = disturbed(case, folder, args=args, draw=draw, left=left)
            compared, lost = compare(results(out), whole[case])
            record = json.loads((out / "run.json").read_text())
            restarts = len(record.get("restarts", []))
            faults = {kind: counts[kind] for kind in FAULTS if counts[kind]}
            kinds.update(faults)
            injected = sum(faults.values())
            totals.update(
                runs=1,
                faults=injected,
                survived=0 if lost else injected,
                restarts=restarts,
                given_up=counts["given up"],
                bytes_compared=compared,
                bytes_lost=lost,
            )
            print(f"{case.name}: {faults}, {restarts} restarts, {lost} bytes lost", flush=True)
            shutil.rmtree(out)
    return {**totals, "kinds": dict(kinds)}


def main() -> int:
    """Print the figures; return 1 if a fault was not survived."""
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    started = time.monotonic()
    figures = soak(args)
    print(json.dumps(figures, indent=2))
    if args.output:
        record = {
            "command": " ".join(["python", "scripts/soak.py", *sys.argv[1:]]),
            "minutes": round((time.monotonic() - started) / 60, 1),
            **figures,
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(args.output, record)
    return int(figures.get("survived") != figures.get("faults"))


if __name__ == "__main__":
    sys.exit(main())
