"""Run a list of cases in one process group: starting one costs more than most cases.

    python -m deepspeed.launcher.runner --num_accelerators 2 worker.py cases.json

`launches.py` writes cases.json and reads the result of each rank, RESULTS/NAME.RANK.json. A case is
the main of a step (with its flags), or a function (with keyword arguments) whose result is kept.
"""

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from launches import MAINS

from dschat.engine.build import start_processes
from dschat.engine.device import on_cpu
from dschat.runtime import dist
from dschat.runtime.log import set_up_logging


def load(path: str):
    """Load a Python file as a module, under a name that no other file has."""
    name = "_".join(Path(path).with_suffix("").parts[-2:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run(case: dict):
    """Return the result of the case's function; None for the main of a step."""
    module = load(case["file"])
    if case["argv"] is None:
        return getattr(module, case["function"])(**case["kwargs"])
    sys.argv = [case["file"], f"--local_rank={os.environ['LOCAL_RANK']}", *case["argv"]]
    module.main()
    return None


def run_main(step: int | str, *, argv: str, out: str) -> None:
    """Run the main of a step, for functions that patch something around it."""
    sys.argv = [
        str(MAINS[step]),
        f"--local_rank={os.environ['LOCAL_RANK']}",
        "--output_dir",
        out,
        *argv.split(),
    ]
    load(str(MAINS[step])).main()


def attempt(case: dict) -> dict:
    """Return the result of a case: ok, its value or its error, and its seconds."""
    started = time.monotonic()
    result: dict = {"ok": True, "value": None}
    try:
        result["value"] = run(case)
    except Exception as error:
        result = {
            "ok": False,
            "error": str(error),
            "error_type": type(error).__name__,
            "traceback": traceback.format_exc(),
        }
    return {**result, "seconds": time.monotonic() - started}


def main() -> None:
    plan = json.loads(Path(sys.argv[-1]).read_text())
    start_processes()
    set_up_logging()
    # DeepSpeed declines fp16 if a CPU has no instructions for it; torch computes it, only slowly.
    if on_cpu():
        get_accelerator().is_fp16_supported = lambda: True
    engines = track_engines()
    # Objects of the imports stay; scanning them in collections takes longer than most cases.
    gc.collect()
    gc.freeze()
    for case in plan["cases"]:
        dist.barrier()
        print(f"\n=== {case['name']}", flush=True)
        torch.manual_seed(0)
        result = attempt(case)
        path = Path(plan["results"]) / f"{case['name']}.{dist.rank()}.json"
        path.write_text(json.dumps(result))
        if not result["ok"] and not case["fails"]:
            print(result["traceback"], flush=True)
            # Other ranks may wait in a collective that this one never enters; `launches.py`
            # starts a new launch.
            os._exit(3)
        for engine in engines:
            engine.destroy()
        engines.clear()
        gc.collect()


def track_engines() -> list:
    """Return a list to which every engine that is built from now on is added."""
    engines: list = []
    initialize = deepspeed.initialize

    def tracked(*args, **kwargs):
        found = initialize(*args, **kwargs)
        engines.append(found[0])
        return found

    deepspeed.initialize = tracked
    return engines


if __name__ == "__main__":
    main()
