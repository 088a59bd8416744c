"""Print the memory that a step needs on each GPU and each host, without loading anything:

    python -m dschat.plan --step 3 --model llama-2-7b --gpus 1 --gpu_gib 24 --actor_lora_dim 64
    --only_optimize_lora

--model is the model of step 1, step 2 or dpo and the actor of step 3, by a published shape's name,
a folder or a hub id.
All other flags are those of the step's main. --sizes prints a table of published sizes instead,
and --cards which of them train on which card, in all steps.
"""

import argparse
from pathlib import Path

from dschat.config.parse import parse_config
from dschat.memory.advice import GIB, needed_bytes
from dschat.memory.cards import CARDS_GIB, CONFIGS, cards_table
from dschat.memory.checks import checked_plan
from dschat.memory.report import check_fit, plan_text
from dschat.models.families import shape_config
from dschat.runtime.log import run_main
from dschat.tracking.table import table

SIZES = (
    "opt-1.3b",
    "opt-6.7b",
    "opt-13b",
    "opt-30b",
    "opt-66b",
    "opt-175b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
)


def main(argv: list[str] | None = None) -> None:
    """Print the plan of the step that the flags describe."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--step", choices=CONFIGS)
    parser.add_argument("--model", help="the model; in step 3 the actor")
    parser.add_argument(
        "--critic", default="opt-350m", help="in step 3 the critic and reward (default: opt-350m)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, one process each (default: 1)")
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, help="GPUs of one host at most (default: 8)"
    )
    parser.add_argument(
        "--gpu_gib", type=float, default=0.0, help="memory of each GPU, to compare with"
    )
    parser.add_argument(
        "--host_gib", type=float, default=0.0, help="memory of each host, to compare with"
    )
    parser.add_argument("--sizes", action="store_true", help=f"a table of {', '.join(SIZES)}")
    parser.add_argument(
        "--cards", action="store_true", help="a table of models and cards, for all steps"
    )
    args, flags = parser.parse_known_args(argv)
    if args.cards:
        print(cards_table())
        return
    if not args.step:
        raise ValueError(f"--step is missing: give one of {', '.join(CONFIGS)}.")
    for name in ("gpus", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1.")
    for name in ("gpu_gib", "host_gib"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(
                f"--{name} {getattr(args, name)}: must be a number of GiB, "
                "or 0 to compare with nothing."
            )
    if args.sizes:
        print(sizes_table(args, flags))
        return
    if not args.model:
        raise ValueError(
            f"--model is missing: give a folder, a hub id or one of {', '.join(SIZES)}."
        )
    config, plan, dtype = planned(args, flags, args.model)
    processes = min(args.gpus, args.gpus_per_node)
    limits = dict(gpu_bytes=args.gpu_gib * GIB, all_host_bytes=args.host_gib * GIB)
    print(f"step {args.step}, {args.model}, {args.gpus} GPU(s), {dtype}; planned, not run")
    print(plan_text(plan, processes=processes, **limits))
    check_fit(config, plan, world_size=args.gpus, processes=processes, dtype=dtype, **limits)


def planned(args: argparse.Namespace, flags: list[str], model: str):
    """Return the configuration, plan and precision of a model."""
    for name in (model, args.critic):
        if "/" not in name and not Path(name).is_dir():
            shape_config(
                name
            )  # a name of neither folder nor hub: unknown ones are an error that lists the known
    names = ["--model_name_or_path", model]
    if args.step == "3":
        names = ["--actor_model_name_or_path", model, "--critic_model_name_or_path", args.critic]
    config = parse_config(CONFIGS[args.step], names + flags)
    dtype = "bf16" if config.model.dtype == "auto" else config.model.dtype
    return config, checked_plan(config, world_size=args.gpus, dtype=dtype), dtype


def sizes_table(args: argparse.Namespace, flags: list[str]) -> str:
    """One row a published size: GiB on each GPU and host, and the smallest common card that holds
    it.
    """
    rows = []
    for name in SIZES:
        _, plan, _ = planned(args, flags, name)
        need = needed_bytes(plan)
        card = next((f"{size} GB" for size, gib in CARDS_GIB.items() if need <= gib * GIB), "none")
        host = plan.host_bytes(processes=min(args.gpus, args.gpus_per_node))
        rows.append([name, f"{need / GIB:.1f}", plan.peak[0], f"{host / GIB:.1f}", card, "planned"])
    header = [
        "step " + args.step,
        "GiB a GPU",
        "worst phase",
        "GiB a host",
        "smallest card",
        "shown by",
    ]
    return table(rows, header=header)


if __name__ == "__main__":
    run_main(main)
