"""Measure generation of answers of unlike length: batch by batch, and in slots that refill.

    python scripts/bench_slots.py --shape llama-2-7b --rows 512 --batch 64 --slots 64 128 256
    python scripts/bench_slots.py --shape smollm2-135m --dtype float32 --rows 64 --batch 8 --slots 8

Prompts have 64 to 256 random tokens. The weights are random, and enough tokens count as ends that
answers are geometric with mean --mean, at most --answer. A row has tokens of answers per second,
everything counted, decode steps, and the share of what they compute that becomes tokens. --json
writes all rows, hardware and versions to a file. On a GPU, steps are captured and compiled; the
first rollout of each row, which captures, is not timed.
"""

import argparse
import gc
import sys
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
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch without slots")
    parser.add_argument("--slots", type=int, nargs="+", default=[64])
    parser.add_argument("--shortest_prompt", type=int, default=64)
    parser.add_argument("--longest_prompt", type=int, default=256)
    parser.add_argument("--mean", type=float, default=250, help="mean tokens of an answer")
    parser.add_argument("--answer", type=int, default=1024, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts; the fastest counts")
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser.parse_args()


def random_prompts(args: argparse.Namespace, vocab: int, device: torch.device) -> list:
    """Return batches of --batch left-padded prompts, as pairs of ids and mask."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        args.shortest_prompt, args.longest_prompt + 1, (args.rows,), generator=draw
    )
    ids = torch.randint(vocab, (args.rows, args.longest_prompt), generator=draw)
    mask = (torch.arange(args.longest_prompt) >= args.longest_prompt - lengths[:, None]).long()
    ids = (ids * mask).to(device)
    return list(zip(ids.split(args.batch), mask.to(device).split(args.batch), strict=True))


def sampling(args: argparse.Namespace, vocab: int) -> GenerationConfig:
    """Return settings under which a token ends an answer with probability 1 / --mean."""
    draw = torch.Generator().manual_seed(1)
    ends = torch.randperm(vocab, generator=draw)[: max(1, round(vocab / args.mean))]
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.answer,
        eos_token_id=ends.tolist(),
        pad_token_id=0,
        num_return_sequences=1,
    )


def measure(model, args: argparse.Namespace, slots: int, device: torch.device) -> dict:
    """Return the row of one number of slots; 0: batch by batch."""
    vocab = model.config.vocab_size
    batches = random_prompts(args, vocab, device)
    settings = sampling(args, vocab)
    hybrid = HybridEngine(
        plain_engine(model, device),
        slots=slots,
        max_rows=slots or args.batch,
        max_length=args.longest_prompt + args.answer,
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
    busy = hybrid.metrics().get("rollout/slots_busy")
    hybrid.shutdown()
    return {"slots": slots, "tokens_per_s": max(rates), "busy": busy}


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
    for slots in (0, *args.slots):
        rows.append(measure(model, args, slots, device))
        print(rows[-1], flush=True)
        gc.collect()
    first = rows[0]["tokens_per_s"]
    cells = [
        [
            str(row["slots"]) if row["slots"] else f"batches of {args.batch}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / first:.2f}",
            "" if row["busy"] is None else f"{100 * row['busy']:.0f}%",
        ]
        for row in rows
    ]
    print(table(cells, header=[f"{args.shape}, slots", "tokens/s", "times", "busy"]))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "rows": rows}
        write_json(args.json, record | {"hardware": hardware(), "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
