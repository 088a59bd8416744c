"""Measure how long training stands still for a checkpoint, with and without --background_save.

    python scripts/bench_saves.py --shape smollm2-135m --length 64
    deepspeed --num_gpus 8 scripts/bench_saves.py --shape llama-2-7b --flags "--zero_stage 2"
    python scripts/bench_saves.py --state_mib 384       # no model: a state of that size

The weights are random. Each row saves --saves checkpoints into --output, after updates that fill
the optimizer's state. It shows the size of this rank's part, the seconds that training stands
still for it (the longest and the shortest save), the seconds until it is complete, and the seconds
of an update without a save and while one is being written.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.checkpoint.background import BackgroundSaves  # noqa: E402
from dschat.checkpoint.run_checkpoint import copy_checkpoint, save_checkpoint  # noqa: E402
from dschat.config.parse import parse_config  # noqa: E402
from dschat.config.sft import SFTConfig  # noqa: E402
from dschat.engine.build import start_processes  # noqa: E402
from dschat.runtime import dist  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.runtime.log import set_up_logging  # noqa: E402
from dschat.tracking.table import table  # noqa: E402
from dschat.trainers.supervised import SFTObjective, run_update  # noqa: E402
from dschat.trainers.supervised_run import SupervisedRun, build_engine  # noqa: E402
from scripts._memory_rows import random_model  # noqa: E402
from scripts.bench_training import Case, random_batch  # noqa: E402

UPDATES = 3  # updates without a save that are timed


@dataclass(frozen=True)
class Row:
    """The figures of one way to save."""

    way: str
    gib: float  # of this rank's files
    stands_still_s: list[float]  # of each save
    complete_s: list[float]  # from the beginning of each save
    update_s: float  # without a save
    update_while_writing_s: float | None  # None: there is none

    def cells(self) -> list[str]:
        """Return the row of a table."""
        during = self.update_while_writing_s
        return [
            self.way,
            f"{self.gib:.2f}",
            f"{min(self.stands_still_s):.2f} to {max(self.stands_still_s):.2f}",
            f"{max(self.complete_s):.2f}",
            f"{self.update_s:.2f}",
            "" if during is None else f"{during:.2f}",
        ]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of models/families.py")
    parser.add_argument(
        "--state_mib", type=int, default=0, help="no model, but a state of so many MiB a rank"
    )
    parser.add_argument("--flags", default="--zero_stage 2", help="flags of step 1")
    parser.add_argument("--rows", type=int, default=1, help="texts of a rank's update")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the checkpoints; default: /tmp")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def make_update(args: argparse.Namespace, device: torch.device):
    """Build the engine; return it and a function that runs one update."""
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    words = f"--model_name_or_path {args.shape} --dtype {dtype} --max_seq_len {args.length} "
    words += f"--per_device_train_batch_size {args.rows} {args.flags}"
    config = parse_config(SFTConfig, words.split())

    def load(path: str, *, dtype: torch.dtype, **_):
        return random_model(path, dtype=dtype, tiny=False, head=False)

    run = SupervisedRun(1, config, device, dtype, None, 2, None)
    engine = build_engine(run, load, total_steps=1000)
    case = Case(1, args.shape, args.rows, length=args.length)
    objective = SFTObjective()
    return engine, lambda step: run_update(engine, objective, [random_batch(case, step)], step)


class StateAlone:
    """An engine of a state alone, whose updates take 50 ms."""

    def __init__(self, mib: int):
        """Fill `mib` MiB."""
        self.state = {"fp32": [torch.randn(2**20 // 4) for _ in range(mib)]}
        self.checkpoint_engine = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        """Save the state as DeepSpeed does."""
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(self.state, f"{folder}/{tag}/rank_{dist.rank()}.pt")


def seconds_of(action) -> float:
    """Return the seconds that ``action()`` takes, on this rank's device too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def begin_save(way: str, root: Path, number: int, contents: dict, saves: BackgroundSaves) -> None:
    """Save a checkpoint now, or copy it and begin to write it in the background."""
    if way == "now":
        save_checkpoint(root, number, **contents)
        return
    write = copy_checkpoint(root, number, **contents, memory=saves.memory, group=saves.group)
    saves.start(write)


def measure(way: str, engine, update, root: Path, args: argparse.Namespace) -> Row:
    """Save checkpoints one way and return the figures."""
    update(1)
    update_s = min(seconds_of(partial(update, 2 + number)) for number in range(UPDATES))
    saves = BackgroundSaves()
    stands_still, complete, during = [], [], []
    for number in range(1, args.saves + 1):
        contents = dict(
            engines={"model": engine},
            facts={"step": number, "processes": dist.world_size()},
            tensors={},
            state={},
            keep=1,
        )
        started = time.perf_counter()
        begin = partial(begin_save, way, root, number, contents, saves)
        stands_still.append(seconds_of(begin))
        if way == "background":
            # All ranks run as many updates; one ends after the others have stopped writing.
            while dist.first_fault("writes" if saves.is_writing() else ""):
                during.append(seconds_of(partial(update, 10 + len(during))))
            if not saves.wait():
                raise RuntimeError("the checkpoint was not saved: see the warning above")
        complete.append(time.perf_counter() - started)
    files = [file for file in root.rglob("*") if file.is_file()]
    gib = sum(file.stat().st_size for file in files) / dist.world_size() / 2**30
    slowest = sum(during) / len(during) if during else None
    return Row(way, gib, stands_still, complete, update_s, slowest)


def main() -> None:
    """Measure both ways and print the rows."""
    args = parse_args()
    set_up_logging()
    device = start_processes(args.local_rank)
    if args.state_mib:
        engine, update = StateAlone(args.state_mib), lambda step: time.sleep(0.05)
    else:
        engine, update = make_update(args, device)
    root = Path(args.output or tempfile.gettempdir()) / "bench_saves"
    rows = []
    for way in ("now", "background"):
        rows.append(measure(way, engine, update, root, args))
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(root)
        dist.barrier()
    if not dist.is_main():
        return
    header = ["save", "GiB a rank", "stands still s", "complete s", "update s", "while writing s"]
    print(table([row.cells() for row in rows], header=header))
    if args.json:
        record = {
            "command": " ".join(["python", "scripts/bench_saves.py", *sys.argv[1:]]),
            "processes": dist.world_size(),
            "hardware": hardware(),
            "versions": versions(),
            "rows": [vars(row) for row in rows],
        }
        write_json(args.json, record)


if __name__ == "__main__":
    main()
