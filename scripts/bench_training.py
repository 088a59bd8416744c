"""Training speed of steps 1, 2 and DPO on random weights of published shapes, beside TRL.

    deepspeed --num_gpus 1 scripts/bench_training.py --cases sft-1.3b --out results
    python scripts/bench_training.py --cases sft-1.3b sft-7b-lora --beside trl
    python scripts/bench_training.py --padding rows.jsonl --out results

It runs the project's own update (`trainers.supervised.run_update`) on full batches of random
tokens, and TRL's trainers on the same shape, rows and lengths. MFU counts 6 (frozen weights: 4)
FLOP per parameter and token, divided by --peak_tflops.

--padding trains nothing and needs no GPU: it counts the real and the computed tokens of files of
data, with and without --tokens_per_batch, --training_tokens_per_batch and --packing.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LORA = "--only_optimize_lora --lora_dim 16 --lora_alpha 32"


@dataclass(frozen=True)
class Case:
    """A shape, a step, and its batch."""

    step: int | str  # 1, 2 or "dpo"
    shape: str
    rows: int  # texts of one rank's batch; pairs count twice
    flags: str = "--zero_stage 0"
    length: int = 512


CASES = {
    "sft-1.3b": Case(1, "opt-1.3b", 16),
    "sft-7b-lora": Case(1, "llama-2-7b", 8, f"--zero_stage 0 {LORA}"),
    "rm-350m": Case(2, "opt-350m", 64),
    "rm-1.3b": Case(2, "opt-1.3b", 16),
    "dpo-1.3b": Case("dpo", "opt-1.3b", 16),
    "sft-7b-zero3": Case(1, "llama-2-7b", 32, "--zero_stage 3 --gradient_checkpointing"),
    "sft-7b-zero3-small": Case(1, "llama-2-7b", 8, "--zero_stage 3 --gradient_checkpointing"),
    "sft-7b-zero2-lora": Case(1, "llama-2-7b", 8, f"--zero_stage 2 {LORA}"),
    "sft-7b-zero3-lora": Case(1, "llama-2-7b", 8, f"--zero_stage 3 {LORA}"),
    "tiny": Case(1, "tiny-opt", 4, length=16),
    "tiny-llama": Case(1, "tiny-llama", 4, length=16),
    "tiny-rm": Case(2, "tiny-opt", 4, length=16),
    "tiny-dpo": Case("dpo", "tiny-opt", 4, length=16),
}


def main() -> None:
    """Measure the cases that were asked for, each in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["sft-1.3b"], choices=list(CASES))
    parser.add_argument("--updates", type=int, default=12, help="Measured after 4 for warm-up.")
    parser.add_argument("--flags", default="", help="More flags of the step.")
    parser.add_argument("--beside", choices=["trl"], help="Measure this library too.")
    parser.add_argument("--gpus", type=int, default=1, help="Ranks on this host.")
    parser.add_argument("--peak_tflops", type=float, default=780.0, help="Of one GPU, in bf16.")
    parser.add_argument("--profile", action="store_true", help="Print where an update goes.")
    parser.add_argument("--padding", nargs="+", metavar="PATH", help="Count padding, no training.")
    parser.add_argument("--tokenizer", help="Of --padding; default: a BPE trained on each file.")
    parser.add_argument("--max_seq_len", type=int, nargs="+", default=[512], help="Of --padding.")
    parser.add_argument("--out", type=Path, help="Folder for one JSON file a case.")
    parser.add_argument("--worker", choices=["dschat", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.padding:
        return measure_padding(args)
    if args.worker:
        measure = measure_trl if args.worker == "trl" else measure_dschat
        return measure(args.cases[0], args)
    for name in args.cases:
        for worker in ("dschat", *([args.beside] if args.beside else [])):
            start_worker(name, worker, args)
    return None


def measure_padding(args: argparse.Namespace) -> None:
    """Count real and computed tokens, and write them as JSON."""
    from dschat.runtime.hardware import versions
    from scripts._padding_shares import measure

    rows = []
    for length in args.max_seq_len:
        rows += measure(args.padding, tokenizer=args.tokenizer, max_seq_len=length)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for row in rows:
            row["data"] = "/".join(Path(row["data"]).parts[-2:])
        found = {
            "tokenizer": args.tokenizer or "BPE of 8,192 tokens trained on each file",
            "rows": rows,
            "versions": versions(),
        }
        (args.out / "padding.json").write_text(json.dumps(found, indent=1) + "\n")


def start_worker(name: str, worker: str, args: argparse.Namespace) -> None:
    """Run one case in fresh processes, so that its memory is its own."""
    command = [sys.executable, __file__, "--cases", name, "--worker", worker]
    if args.gpus > 1 and worker == "dschat":
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(args.gpus),
        ]
        command = [*launcher, *command[1:]]
    command += ["--updates", str(args.updates), "--peak_tflops", str(args.peak_tflops)]
    command += [f"--flags={args.flags}"]
    if args.profile:
        command.append("--profile")
    if args.out:
        command += ["--out", str(args.out)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        print(f"{name}, {worker}: failed with status {done.returncode}", flush=True)


def measure_dschat(name: str, args: argparse.Namespace) -> None:
    """Time the project's own updates."""
    import torch

    from dschat.config.dpo import DPOConfig
    from dschat.config.parse import parse_config
    from dschat.config.reward import RewardConfig
    from dschat.config.sft import SFTConfig
    from dschat.engine.build import start_processes
    from dschat.engine.device import TORCH_DTYPES
    from dschat.runtime import dist
    from dschat.runtime.log import set_up_logging
    from dschat.trainers.dpo import DPOObjective, build_reference
    from dschat.trainers.supervised import RewardObjective, SFTObjective, run_update
    from dschat.trainers.supervised_run import SupervisedRun, build_engine

    case = CASES[name]
    start_processes()
    set_up_logging()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config_class = {1: SFTConfig, 2: RewardConfig, "dpo": DPOConfig}[case.step]
    rows = case.rows if case.step == 1 else case.rows // 2
    flags = (
        f"--model_name_or_path {case.shape} --dtype {'bf16' if on_gpu else 'fp32'} {case.flags} "
    )
    flags += f"--per_device_train_batch_size {rows} --max_seq_len {case.length} {args.flags}"
    config = parse_config(config_class, flags.split())

    def load(path: str, *, dtype, **_):
        return random_model(path, dtype=dtype, head=case.step == 2)

    run = SupervisedRun(1, config, device, config.model.dtype, None, 2, None)
    engine = build_engine(run, load, total_steps=args.updates + 4)
    if case.step == "dpo":
        from dschat.trainers import dpo

        dpo.load_start = lambda run, _, ds_config, dropout: load(
            case.shape, dtype=TORCH_DTYPES[run.dtype]
        )
        objective = DPOObjective(build_reference(run), beta=0.1, label_smoothing=0.0)
    else:
        objective = SFTObjective() if case.step == 1 else RewardObjective()
    losses = []

    def update(step: int) -> None:
        values = run_update(engine, objective, [random_batch(case, step)], step)
        losses.append(values["train/loss"])

    seconds = time_updates(update, args.updates)
    if args.profile and dist.is_main():
        profile_update(update)
    if dist.is_main():
        report(name, "dschat", args, seconds, num_parameters(engine), losses)


def measure_trl(name: str, args: argparse.Namespace) -> None:
    """Time TRL's trainers on the same work, with bf16 weights and with fp32 master weights."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    case = CASES[name]
    for weights in ("bf16", "fp32"):
        dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        model = random_model(case.shape, dtype=dtype, head=case.step == 2)
        model = getattr(model, "model", model) if case.step == 2 else model
        marks: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_, marks=marks, **__):
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

        trainer = make_trl_trainer(case, model, Dataset, [Clock()], updates=args.updates + 4)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        times = [after - before for before, after in zip(marks[3:], marks[4:], strict=False)]
        kind = f"trl-{weights}"
        report(name, kind, args, times, sum(p.numel() for p in model.parameters()), [])
        del trainer, model
        torch.cuda.empty_cache()


def make_trl_trainer(case: Case, model, dataset_class, callbacks: list, *, updates: int):
    """Build TRL's trainer of the step, on rows of random words."""
    import random
    import tempfile

    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    pairs = case.step != 1
    rows = case.rows // 2 if pairs else case.rows
    draw = random.Random(0)
    half = case.length // 2

    def ids(count: int) -> list[int]:
        return [draw.randrange(5, 30000) for _ in range(count)]

    common = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=updates,
        bf16=True,
        gradient_checkpointing="--gradient_checkpointing" in case.flags,
        report_to=[],
        logging_steps=1000,
        save_strategy="no",
        optim="adamw_torch_fused",
        max_length=case.length,
    )
    peft = None
    if "lora" in case.flags:
        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    options = dict(model=model, processing_class=random_tokenizer(), callbacks=callbacks)
    num = rows * (updates + 2)
    if case.step == 1:
        data = dataset_class.from_dict({"input_ids": [ids(case.length) for _ in range(num)]})
        args = SFTConfig(**common, packing=False)
        return SFTTrainer(args=args, train_dataset=data, peft_config=peft, **options)
    columns = {
        name: [" ".join(f"w{i}" for i in ids(half - 2)) for _ in range(num)]
        for name in ("prompt", "chosen", "rejected")
    }
    data = dataset_class.from_dict(columns)
    if case.step == 2:
        return RewardTrainer(args=RewardConfig(**common), train_dataset=data, **options)
    reference = copy.deepcopy(model)
    args = DPOConfig(**common)
    return DPOTrainer(ref_model=reference, args=args, train_dataset=data, **options)


def random_model(shape: str, *, dtype, head: bool):
    """Return a model of `shape` with random weights, made where it stays."""
    from scripts._memory_rows import random_model as make

    return make(shape, dtype=dtype, tiny=False, head=head)


def random_tokenizer():
    """Return a tokenizer of 32,000 words, for trainers that insist on text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(32000)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", bos_token="w1", eos_token="w2"
    )


def random_batch(case: Case, step: int):
    """Return a batch of random tokens without padding: TextBatch [rows, T] or PairBatch."""
    import torch

    from dschat.algorithms.types import PairBatch, TextBatch
    from dschat.runtime import dist

    draw = torch.Generator().manual_seed(1000 * step + dist.rank())
    high = 250 if case.shape.startswith("tiny") else 30000
    ids = torch.randint(5, high, (case.rows, case.length), generator=draw)
    mask = torch.ones_like(ids)
    if case.step == 1:
        return TextBatch(ids, mask, ids)
    half = case.length // 2
    pairs = case.rows // 2
    ids[pairs:, :half] = ids[:pairs, :half]
    labels = ids.clone()
    labels[:, :half] = -100
    return PairBatch(ids, mask, labels, torch.zeros(case.rows))


def time_updates(update: Callable[[int], None], updates: int) -> list[float]:
    """Return the seconds of each update after four for warm-up."""
    import torch

    seconds = []
    for step in range(updates + 4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if step == 4:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        update(step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[4:]


def profile_update(update: Callable[[int], None]) -> None:
    """Print the kernels, launches and synchronisations of one update."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        update(99)
        torch.cuda.synchronize()
    averages = recorded.key_averages()
    print(
        averages.table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70),
        flush=True,
    )
    launches = sum(event.count for event in averages if "aunchKernel" in event.key)
    waits = {
        event.key: event.count
        for event in averages
        if "Synchronize" in event.key or event.key in ("aten::item", "aten::nonzero")
    }
    print(f"launches {launches}, waits {waits}", flush=True)


def num_parameters(engine) -> int:
    """Return the number of parameters of the base model, without adapters."""
    return sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in engine.module.named_parameters()
        if "lora_" not in name
    )


def report(
    name: str,
    kind: str,
    args: argparse.Namespace,
    seconds: list[float],
    parameters: int,
    losses: list,
) -> None:
    """Print one line, and write it as JSON."""
    import torch

    from dschat.runtime.hardware import hardware, versions

    case = CASES[name]
    ordered = sorted(seconds)
    median = ordered[len(ordered) // 2]
    tokens = case.rows * case.length
    flop = (4 if "lora" in case.flags else 6) * parameters * tokens
    if case.step == "dpo":
        flop += 2 * parameters * tokens  # the reference's forward
    on_gpu = torch.cuda.is_available()
    found = {
        "case": name,
        "library": kind,
        **asdict(case),
        "more_flags": args.flags,
        "gpus": int(os.environ.get("WORLD_SIZE", 1)),
        "seconds": round(median, 4),
        "spread": [round(ordered[0], 4), round(ordered[-1], 4)],
        "tokens_per_s_gpu": round(tokens / median),
        "mfu": round(flop / median / args.peak_tflops / 1e12, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "losses": [round(loss, 5) for loss in losses[:6]],
        "hardware": hardware(),
        "versions": versions(),
    }
    print(
        f"RESULT {name} {kind}: {found['tokens_per_s_gpu']:,} tokens/s, {1e3 * median:.0f} ms, "
        f"MFU {100 * found['mfu']:.1f}%, peak {found['peak_gib']} GiB, losses {found['losses']}",
        flush=True,
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}-{kind}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
