"""Measure the tokens per second of each way to generate, on random weights of a named shape.

    python scripts/bench_generation.py --shape llama-2-7b --batch 16 --paths compiled graph plain
    python scripts/bench_generation.py --shape llama-2-13b --gpus 2 --paths zero3-compiled zero3-tp

Each path answers the same random prompts of --prompt tokens with --answer sampled tokens; no answer
ends early. A row has the milliseconds of a decode step (without the prefill), the tokens per
second, and the share of the limit. The limit is the time to read all weights and the mean key-value
cache once, at the copy bandwidth that is measured first.

Paths under ZeRO-3 also run on several GPUs, with --batch prompts on each. Their weights are
gathered for every rollout, as after an update, and a row has the gather's share of the rollout.
--json writes all rows, hardware and versions to a file. --profile adds the kernels of a decode
step.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.config.options import SystemOptions  # noqa: E402
from dschat.engine.build import build_inference_engine, start_processes  # noqa: E402
from dschat.engine.ds_config import inference_config  # noqa: E402
from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator, cache_bytes  # noqa: E402
from dschat.generation.decoding import SlotCache, prefill_slots  # noqa: E402
from dschat.generation.tensor_parallel import split_problems, tensor_group  # noqa: E402
from dschat.models.families import shape_config  # noqa: E402
from dschat.runtime import dist  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.runtime.log import set_up_logging  # noqa: E402
from dschat.tracking.table import table  # noqa: E402
from scripts.bench_training_memory import launcher  # noqa: E402

PATHS = {
    "compiled": "Hybrid Engine: CUDA graphs, compiled",
    "graph": "Hybrid Engine: CUDA graphs",
    "eager": "Hybrid Engine: eager",
    "plain": "module.generate",
    "zero3": "module.generate under ZeRO-3",
    "zero3-compiled": "Hybrid Engine under ZeRO-3, compiled",
    "zero3-tp": "Hybrid Engine under ZeRO-3, tensor parallel",
}
SLOW_STEPS = 32  # answer tokens of the path that would take minutes


def parse_args() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="llama-2-7b", help="a shape of dschat/models/families.py"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--answer", type=int, default=256, help="answer tokens")
    parser.add_argument("--paths", nargs="+", default=["compiled", "graph", "plain"], choices=PATHS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of timed rollouts; the fastest counts"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the kernels of the fastest path's decode steps",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="ranks, each on one GPU (without GPUs, on the CPU)",
    )
    parser.add_argument(
        "--inference_tp_size", type=int, help="ranks of a zero3-tp group (default: all)"
    )
    # The launcher sets this one.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.inference_tp_size = args.inference_tp_size or args.gpus
    alone = [path for path in args.paths if not path.startswith("zero3")]
    if args.gpus > 1 and alone:
        parser.error(
            f"--paths {' '.join(alone)}: on several GPUs only paths under ZeRO-3 differ from one "
            "GPU. Leave these out, or use --gpus 1."
        )
    if "zero3-tp" in args.paths:
        if args.inference_tp_size == 1:
            parser.error("--paths zero3-tp needs --gpus 2 or more.")
        for problem in split_problems(
            shape_config(args.shape), args.inference_tp_size, world_size=args.gpus
        ):
            parser.error(problem)
    return args


def copy_bandwidth(device: torch.device) -> float:
    """Measure a large copy on the device; return the bytes per second, read and written."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / seconds


def timed(call, device: torch.device) -> float:
    """Return the seconds of a call, including the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def random_model(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Return a model of the shape with random weights, made on the device."""
    config = shape_config(args.shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
        return model.eval()


def plain_engine(model: torch.nn.Module, device: torch.device) -> SimpleNamespace:
    """Return what a generator uses of an engine, around a plain module."""
    return SimpleNamespace(
        module=model,
        device=device,
        global_steps=0,
        eval=model.eval,
        zero_optimization_stage=lambda: 0,
    )


def make_generator(path: str, model: torch.nn.Module, device: torch.device, tp_size: int):
    """Return the generator of a path, on `model` or on a ZeRO-3 engine around it."""
    if path.startswith("zero3"):
        config = inference_config(
            SystemOptions(zero_stage=3),
            dtype=dtype_name(model),
            micro_batch_size=1,
            world_size=dist.world_size(),
        )
        engine = build_inference_engine(model, ds_config=config)
    else:
        engine = plain_engine(model, device)
    if path in ("plain", "zero3"):
        return PlainGenerator(engine)
    group = tensor_group(tp_size) if path == "zero3-tp" else None
    return HybridEngine(
        engine, cuda_graph=path != "eager", compiled=path.endswith("compiled"), group=group
    )


def dtype_name(model: torch.nn.Module) -> str:
    """Return the name of the model's dtype as flags spell it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[model.dtype]


def measure(
    path: str, model, args: argparse.Namespace, batch: int, device: torch.device, bandwidth: float
) -> dict:
    """Measure a path and return its row."""
    under_zero3 = path.startswith("zero3")
    num_new = min(SLOW_STEPS, args.answer) if path == "zero3" else args.answer
    generation = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_new,
        pad_token_id=0,
        eos_token_id=[],
    )
    generation.num_return_sequences = 1
    generation.min_new_tokens = 0
    torch.manual_seed(dist.rank())
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (batch, args.prompt), device=device)
    mask = torch.ones_like(ids)
    generator = make_generator(path, model, device, args.inference_tp_size)
    gathers = []

    def rollout() -> None:
        # As an update does: the weights that the engine has gathered are out of date.
        generator.engine.global_steps += 1
        generator.decode(ids, mask, generation)
        gathers.append(generator.metrics().get("time/gather_s", 0.0))

    warm_s = timed(rollout, device)
    gathers.clear()
    rollouts = [timed(rollout, device) for _ in range(args.repeats)]
    fastest = rollouts.index(min(rollouts))
    prefill_s = 0.0
    if not under_zero3:
        prefill_s = min(timed(lambda: run_prefill(model, ids, mask), device) for _ in range(2))
    step_s = (min(rollouts) - prefill_s) / max(num_new - 1, 1)
    if under_zero3:
        num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    else:
        num_weights = sum(p.numel() for p in model.parameters() if p.dim() > 0)
    weights = num_weights * model.dtype.itemsize
    if path == "zero3-tp":
        # A group of N ranks splits each layer N ways; the cache has an Nth of the heads for N times
        # the rows.
        weights /= args.inference_tp_size
    mean_length = args.prompt + num_new // 2
    cache = cache_bytes(model, rows=batch, length=mean_length, itemsize=model.dtype.itemsize)
    limit_s = (weights + cache) / bandwidth
    row = {
        "path": path,
        "shape": args.shape,
        "batch": batch,
        "prompt": args.prompt,
        "answer": num_new,
        "gpus": dist.world_size(),
        "tokens_per_s": dist.world_size() * batch / step_s,
        "ms_per_step": 1e3 * step_s,
        "limit_ms": 1e3 * limit_s,
        "share_of_limit": limit_s / step_s,
        "prefill_ms": 1e3 * prefill_s,
        "rollout_s": min(rollouts),
        "first_rollout_s": warm_s,
        "gather_s": gathers[fastest],
        "gather_share": gathers[fastest] / rollouts[fastest],
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
    }
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    if args.profile and device.type == "cuda" and path in ("compiled", "graph"):
        row["kernels"] = profile(generator, ids, mask, generation)
    generator.shutdown()
    return row


def run_prefill(model, ids, mask) -> None:
    """Read the prompts into a new cache."""

    def make_cache(shapes) -> SlotCache:
        return SlotCache(shapes, rows=len(ids), length=ids.shape[1] + 1)

    with torch.no_grad():
        prefill_slots(model, ids, mask, copies=1, make_cache=make_cache)


def profile(generator, ids, mask, generation) -> list[dict]:
    """Print and return the kernels of a rollout with the most time.

    Times are microseconds per decode step.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        generator.decode(ids, mask, generation)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:18]
    steps = generation.max_new_tokens - 1
    rows = [
        {
            "kernel": event.key[:90],
            "us_per_step": event.self_device_time_total / steps,
            "calls_per_step": event.count / steps,
        }
        for event in events
    ]
    cells = [
        [row["kernel"], f"{row['us_per_step']:.1f}", f"{row['calls_per_step']:.1f}"] for row in rows
    ]
    print(table(cells, header=["kernel", "us", "calls"]))
    return rows


def main() -> int:
    """Measure the paths, or launch this script on several GPUs."""
    args = parse_args()
    if args.gpus > 1 and args.local_rank < 0:
        command = [*launcher(args.gpus), __file__, *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    device = start_processes(args.local_rank)
    set_up_logging()
    bandwidth = copy_bandwidth(device)
    model = random_model(args, device)
    rows = []
    # ZeRO-3 comes last: a model that it has partitioned cannot run otherwise.
    for path in sorted(args.paths, key=lambda path: path.startswith("zero3")):
        for batch in args.batch:
            row = measure(path, model, args, batch, device, bandwidth)
            rows.append(row)
            gc.collect()
            if dist.is_main():
                shown = {}
                for key, value in row.items():
                    if key != "kernels":
                        shown[key] = round(value, 3) if isinstance(value, float) else value
                print(shown, flush=True)
    if dist.is_main():
        report(rows, args, bandwidth)
    return 0


def report(rows: list[dict], args: argparse.Namespace, bandwidth: float) -> None:
    """Print the table, and write the rows to the file of --json."""
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, {args.gpus} rank(s)")
    cells = [
        [
            PATHS[row["path"]],
            str(row["batch"]),
            f"{row['ms_per_step']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['limit_ms']:.2f}",
            f"{100 * row['share_of_limit']:.0f}%",
            f"{100 * row['gather_share']:.1f}%",
        ]
        for row in rows
    ]
    header = [args.shape, "batch", "ms/step", "tokens/s", "limit, ms", "of the limit", "gather"]
    print(table(cells, header=header))
    if args.json:
        record = {
            "rows": rows,
            "copy_bandwidth": bandwidth,
            "hardware": hardware(),
            "versions": versions(),
        }
        write_json(args.json, record)


if __name__ == "__main__":
    sys.exit(main())
