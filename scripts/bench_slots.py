"""Measure generation of answers of unlike length: batch by batch, and in slots that refill.

    python scripts/bench_slots.py --shape llama-3-8b --batch 64 --slots 64 256 --beside vllm
    python scripts/bench_slots.py --shape llama-3-8b --batch 0 --slots 384 --cache_gib 12
    python scripts/bench_slots.py --batch 0 --slots 256 --rows 32 --copies 16 --shortest_prompt 1024
    python scripts/bench_slots.py --shape smollm2-135m --dtype float32 --rows 64 --batch 8 --slots 8

Prompts have --shortest_prompt to --longest_prompt random tokens. The weights are random, and enough
tokens count as ends that answers are geometric with mean --mean, at most --answer; with --mean 0
all have --answer tokens. A row has tokens of answers per second, everything counted, and the share
of what decode steps compute that becomes tokens. --beside vllm generates the same with vLLM, if it
is installed. --json writes all rows, hardware and versions to a file. On a GPU, steps are captured
and compiled; the first rollout of each row, which captures, is not timed.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.engine.hybrid_engine import HybridEngine  # noqa: E402
from dschat.generation.sampling import response_mask  # noqa: E402
from dschat.models.families import shape_config  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402
from dschat.runtime.log import set_up_logging  # noqa: E402
from dschat.tracking.table import table  # noqa: E402
from scripts.bench_generation import plain_engine, timed  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", help="a shape of models/families.py")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=512, help="prompts of a rollout")
    parser.add_argument("--copies", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--batch", type=int, default=64, help="rows without slots; 0: not measured")
    parser.add_argument("--slots", type=int, nargs="+", default=[64])
    parser.add_argument(
        "--cache_gib", type=float, default=0.0, help="key-value cache; 0: what the slots may need"
    )
    parser.add_argument("--shortest_prompt", type=int, default=64)
    parser.add_argument("--longest_prompt", type=int, default=256)
    parser.add_argument("--mean", type=float, default=250, help="mean tokens of an answer")
    parser.add_argument("--answer", type=int, default=1024, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts; the fastest counts")
    parser.add_argument("--beside", choices=["vllm"], help="measure this engine too")
    parser.add_argument("--profile", action="store_true", help="print the kernels of some steps")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    args.longest_prompt = max(args.longest_prompt, args.shortest_prompt)
    return args


def random_prompts(
    args: argparse.Namespace, vocab: int, device: torch.device, *, batch: int
) -> list:
    """Return batches of left-padded prompts, as pairs of ids and mask."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        args.shortest_prompt, args.longest_prompt + 1, (args.rows,), generator=draw
    )
    ids = torch.randint(vocab, (args.rows, args.longest_prompt), generator=draw)
    mask = (torch.arange(args.longest_prompt) >= args.longest_prompt - lengths[:, None]).long()
    ids = (ids * mask).to(device)
    return list(zip(ids.split(batch), mask.to(device).split(batch), strict=True))


def end_ids(args: argparse.Namespace, vocab: int) -> list[int]:
    """Return so many ids that one of them is drawn with probability 1 / --mean."""
    if args.mean == 0:
        return []
    draw = torch.Generator().manual_seed(1)
    return torch.randperm(vocab, generator=draw)[: max(1, round(vocab / args.mean))].tolist()


def sampling(args: argparse.Namespace, vocab: int) -> GenerationConfig:
    """Return the settings of the answers."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.answer,
        eos_token_id=end_ids(args, vocab),
        pad_token_id=0,
        num_return_sequences=args.copies,
    )


def measure(model, args: argparse.Namespace, slots: int, device: torch.device) -> dict:
    """Return the row of one number of slots; 0: batch by batch."""
    vocab = model.config.vocab_size
    batches = random_prompts(args, vocab, device, batch=args.batch or args.rows)
    settings = sampling(args, vocab)
    hybrid = HybridEngine(
        plain_engine(model, device),
        slots=slots,
        max_rows=slots or args.batch,
        max_length=args.longest_prompt + args.answer,
        cache_gib=args.cache_gib if slots else 0.0,
    )
    rates = []
    for repeat in range(args.repeats + (device.type == "cuda")):
        torch.manual_seed(repeat)
        decoded: list = []
        seconds = timed(
            lambda out=decoded: out.extend(hybrid.decode_all(batches, settings)), device
        )
        masks = [response_mask(one.tokens, settings.eos_token_id) for one in decoded]
        tokens = sum(int(mask.sum()) for mask in masks)
        rates.append(tokens / seconds)
    found = hybrid.metrics()
    if args.profile:
        profile_steps(lambda: hybrid.decode_all(batches, settings))
    hybrid.shutdown()
    return {
        "engine": f"{slots} slots" if slots else f"batches of {args.batch}",
        "slots": slots,
        "tokens_per_s": max(rates),
        "busy": found.get("rollout/slots_busy"),
        "preempted": found.get("rollout/preempted"),
        "prefill_share": found.get("rollout/prefill_share"),
    }


def profile_steps(rollout) -> None:
    """Print where the time of a rollout goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        rollout()
    events = recorded.key_averages()
    print(events.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def measure_vllm(args: argparse.Namespace) -> dict:
    """Return vLLM's row, measured in a separate process."""
    config = shape_config(args.shape)
    batches = random_prompts(args, config.vocab_size, torch.device("cpu"), batch=args.rows)
    (ids, mask) = batches[0]
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = args.dtype
        config.save_pretrained(folder)
        work = {
            "model": folder,
            "prompts": [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)],
            "ends": end_ids(args, config.vocab_size),
            "copies": args.copies,
            "answer": args.answer,
            "dtype": args.dtype,
            "cache_bytes": int(args.cache_gib * 2**30) or None,
            "max_length": args.longest_prompt + args.answer,
            "max_seqs": max(args.slots),
            "repeats": args.repeats,
        }
        script = Path(__file__).with_name("_vllm_rollout.py")
        done = subprocess.run(
            [sys.executable, str(script)],
            input=json.dumps(work),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure batch by batch, then each number of slots."""
    args = parse_args()
    set_up_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shape_config(args.shape), dtype=getattr(torch, args.dtype)
        ).eval()
    rows = []
    for slots in ([0] if args.batch else []) + args.slots:
        rows.append(measure(model, args, slots, device))
        print(rows[-1], flush=True)
        gc.collect()
    if args.beside:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(measure_vllm(args))
    first = rows[0]["tokens_per_s"]
    cells = [
        [
            row["engine"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / first:.2f}",
            *(
                f"{100 * row[name]:.0f}%" if row.get(name) is not None else ""
                for name in ("busy", "prefill_share")
            ),
        ]
        for row in rows
    ]
    print(table(cells, header=[args.shape, "tokens/s", "times", "busy", "prefill"]))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "rows": rows}
        write_json(args.json, record | {"hardware": hardware(), "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
