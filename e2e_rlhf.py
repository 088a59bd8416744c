"""Run the three steps of RLHF.

Without arguments, train a real 135M model on real film-review sentences and print the results:

    python e2e_rlhf.py

Train a model given by size, name or folder:

    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m
    python e2e_rlhf.py --actor-model tiny-llama --reward-model tiny-llama  # a minute, offline

If a step fails or is stopped, the run stops. The same command then continues with the first step
that has not finished, from its latest checkpoint if it has one.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from dschat.pipeline.arguments import (  # noqa: E402
    check_arguments,
    default_reward_model,
    resolve_model,
    size_name,
)
from dschat.pipeline.child import run_logged, start_process  # noqa: E402
from dschat.pipeline.launcher import launcher_command  # noqa: E402
from dschat.pipeline.recipes import step_flags  # noqa: E402
from dschat.pipeline.records import begin, finish, finished_seconds  # noqa: E402
from dschat.pipeline.summary import (  # noqa: E402
    ppo_section,
    read_jsonl,
    summary_text,
    supervised_section,
    where_next,
)
from dschat.report.page import write_report  # noqa: E402
from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import (  # noqa: E402
    hardware,
    op_build_name,
    threads_per_rank,
    versions,
)
from dschat.runtime.log import set_up_logging  # noqa: E402
from dschat.runtime.paths import cache_dir  # noqa: E402
from dschat.runtime.ports import free_port  # noqa: E402

MAINS = {
    1: ROOT / "training" / "step1_supervised_finetuning" / "main.py",
    2: ROOT / "training" / "step2_reward_model_finetuning" / "main.py",
    3: ROOT / "training" / "step3_rlhf_finetuning" / "main.py",
}
TITLES = {1: "Step 1: supervised fine-tuning", 2: "Step 2: reward model", 3: "Step 3: PPO"}
STEP_NAMES = {1: "sft", 2: "reward", 3: "ppo"}
DEPENDENTS = {1: (3,), 2: (3,), 3: ()}  # the steps that start from each step's model


@dataclass(frozen=True)
class Plan:
    """The models, data and folders of a run."""

    kind: str  # "demo", "tiny" or "real"
    actor: str  # the model that step 1 starts from
    reward: str  # the model that step 2 starts from
    data: dict[int, list[str]]  # the data flags of each step
    outputs: dict[int, Path]


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--step", type=int, nargs="+", choices=(1, 2, 3), help="run these steps, even if finished"
    )
    parser.add_argument(
        "--actor-model", default="", help="size (1.3b), name, folder or hub id; default: demo"
    )
    parser.add_argument(
        "--reward-model",
        default="",
        help="as --actor-model; default: 350m for an OPT actor, else the actor's model",
    )
    parser.add_argument("--actor-zero-stage", default="", choices=("", "0", "1", "2", "3"))
    parser.add_argument("--reward-zero-stage", default="", choices=("", "0", "1", "2", "3"))
    parser.add_argument(
        "--dtype",
        default="",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="precision of all steps; default: fp32 for tiny models, else auto, the fastest here",
    )
    parser.add_argument(
        "--output-dir",
        type=lambda path: os.path.abspath(os.path.expanduser(path)),
        default="./output",
    )
    parser.add_argument(
        "--deployment-type",
        default="single_gpu",
        choices=("single_gpu", "single_node", "multi_node"),
    )
    parser.add_argument(
        "--data-path", nargs="+", help="data for all three steps, like --data_path of the mains"
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        default=0,
        help="ranks on this machine; default: by deployment type",
    )
    parser.add_argument("--hostfile", help="DeepSpeed hostfile, for multi_node")
    parser.add_argument(
        "--save-interval",
        type=int,
        default=0,
        help="updates (step 3: rollouts) between checkpoints; 0: save only when stopped",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="start a step again so many times after a fault; needs --save-interval",
    )
    parser.add_argument(
        "--fit",
        default="auto",
        choices=("auto", "none"),
        help="auto (default): if a step does not fit the GPU, it takes the cheapest flags that "
        "change speed alone; none: it stops and names them",
    )
    parser.add_argument(
        "--report-to",
        nargs="+",
        help="send the metrics of all steps to tensorboard, csv, wandb, trackio or mlflow, too",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="run every step (with --step: those) from the beginning; delete earlier checkpoints",
    )
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    """Resolve the model names, and download or make the models and data of demo and tiny runs.

    Raises:
        ValueError: a model name is unknown, or the two models do not fit together.
    """
    kind, actor = resolve_model(args.actor_model)
    default = default_reward_model(actor) if kind == "real" else args.actor_model
    reward_kind, reward = resolve_model(args.reward_model or default)
    if kind != reward_kind:
        raise ValueError(
            f"--actor-model {args.actor_model or 'default'} and --reward-model "
            f"{args.reward_model or 'default'} do not fit together: give two default, two tiny or "
            "two real models."
        )
    output = Path(args.output_dir)
    outputs = {
        1: output / "actor-models" / size_name(actor),
        2: output / "reward-models" / size_name(reward),
        3: output / "step3-models" / size_name(actor),
    }
    if kind == "real":
        data = {step: ["--data_path", *args.data_path] if args.data_path else [] for step in MAINS}
        return Plan(kind, actor, reward, data, outputs)
    shares = {1: "1,0,0", 2: "0,1,0", 3: "0,0,1"}
    if kind == "tiny":
        from dschat.demo.tiny_models import make_tiny_model
        from dschat.demo.toy import write_toy_data

        paths = {step: write_toy_data(output / "toy-data") for step in MAINS}
        actor = str(make_tiny_model(output / "tiny-models" / actor, family=actor))
        reward = str(make_tiny_model(output / "tiny-models" / reward, family=reward))
    else:
        from dschat.demo.reviews import build_reviews
        from dschat.demo.smollm2 import smollm2_folder

        actor = reward = str(smollm2_folder())
        folder = build_reviews()
        paths = {1: folder / "sft", 2: folder / "pairs", 3: folder / "prompts"}
    data = {
        step: ["--data_path", *(args.data_path or [str(path)]), "--data_split", shares[step]]
        for step, path in paths.items()
    }
    return Plan(kind, actor, reward, data, outputs)


def check_pair(args: argparse.Namespace, plan: Plan) -> None:
    """Check that the critic of step 3 can read the actor's tokens.

    If step 3 is not run, the difference is only printed.

    Raises:
        ValueError: the critic cannot, and step 3 is run.
    """
    if plan.kind != "real":
        return
    from dschat.trainers.reward_plan import tokenizer_mismatch

    fault = tokenizer_mismatch(plan.actor, plan.reward)
    if fault and 3 in (args.step or MAINS):
        raise ValueError(fault)
    if fault:
        print(fault, flush=True)


def step_command(step: int, plan: Plan, args: argparse.Namespace, *, on_gpu: bool) -> list[str]:
    """Return the path of a step's main and its flags."""
    models = {
        1: ["--model_name_or_path", plan.actor],
        2: ["--model_name_or_path", plan.reward],
        3: [
            *("--actor_model_name_or_path", str(plan.outputs[1])),
            *("--critic_model_name_or_path", str(plan.outputs[2])),
        ],
    }
    flags = step_flags(
        step,
        kind=plan.kind,
        on_gpu=on_gpu,
        single_gpu=args.deployment_type == "single_gpu",
        actor_stage=args.actor_zero_stage,
        reward_stage=args.reward_zero_stage,
        dtype=args.dtype,
    )
    if on_gpu and args.fit != "none":
        flags += ["--fit", args.fit]
    if args.report_to:
        flags += ["--report_to", *args.report_to]
    if args.save_interval:
        flags += ["--save_interval", str(args.save_interval)]
    if args.max_restarts:
        flags += ["--max_restarts", str(args.max_restarts)]
    return [
        str(MAINS[step]),
        *models[step],
        *plan.data[step],
        *flags,
        "--output_dir",
        str(plan.outputs[step]),
    ]


def num_processes(args: argparse.Namespace, *, on_gpu: bool) -> int:
    """Return the number of ranks on this machine.

    0 leaves it to DeepSpeed, which uses all devices of this machine or those of the hostfile.
    """
    if args.deployment_type == "multi_node":
        return 0
    single = args.deployment_type == "single_gpu" or not on_gpu
    return args.num_processes or int(single)


def launcher(args: argparse.Namespace, *, on_gpu: bool, port: int) -> list[str]:
    """Return the deepspeed command that starts a main."""
    return launcher_command(
        port=port,
        processes=num_processes(args, on_gpu=on_gpu),
        on_gpu=on_gpu,
        several_hosts=args.deployment_type == "multi_node",
        hostfile=args.hostfile,
    )


def run_step(command: list[str], log: Path, args: argparse.Namespace, *, on_gpu: bool) -> None:
    """Run a main and its flags under DeepSpeed's launcher; see ``run_logged``."""
    port = free_port()
    count = num_processes(args, on_gpu=on_gpu)
    defaults = {}
    if not on_gpu:
        defaults["OMP_NUM_THREADS"] = str(threads_per_rank(count))
    environment = child_environment(defaults)
    # The fork has no supervisor.
    if count and "CUDA_VISIBLE_DEVICES" not in os.environ and not args.max_restarts:
        from dschat.engine.fork_launcher import start_launcher

        start = partial(
            start_launcher, command, num_processes=count, master_port=port, environment=environment
        )
    else:
        full_command = launcher(args, on_gpu=on_gpu, port=port) + command
        start = partial(start_process, full_command, environment)
    run_logged(start, log)


def child_environment(defaults: dict[str, str]) -> dict[str, str]:
    """Return this environment over `defaults`, with the repository on Python's path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"TOKENIZERS_PARALLELISM": "false", **defaults, **os.environ, "PYTHONPATH": path}


def build_ops(*, on_gpu: bool) -> float:
    """Build DeepSpeed's CPU communication op; return the seconds, 0 if it is already built."""
    marker = cache_dir() / "ops" / op_build_name()
    if on_gpu or marker.exists():
        return 0.0
    print("building DeepSpeed's CPU communication op (once, about a minute)", flush=True)
    started = time.monotonic()
    code = "from dschat.engine.build import start_processes; start_processes()"
    command = [sys.executable, "-c", code]
    run_logged(partial(start_process, command, child_environment({})), marker.with_suffix(".log"))
    marker.touch()
    return time.monotonic() - started


def run_steps(args: argparse.Namespace, plan: Plan, *, on_gpu: bool) -> dict[str, float]:
    """Run the steps that have not finished; return the seconds of all, by step name."""
    from dschat.tracking.progress import clock  # imports torch, which --help does not need

    seconds = {}
    for step in args.step or (1, 2, 3):
        command = step_command(step, plan, args, on_gpu=on_gpu)
        folder = plan.outputs[step]
        later = [plan.outputs[other] for other in DEPENDENTS[step]]
        known = finished_seconds(folder, command)
        if known is not None and not args.fresh and not args.step:
            print(f"\n{TITLES[step]}: finished before, {clock(known)} (--fresh runs it again)")
            seconds[STEP_NAMES[step]] = known
            continue
        print(f"\n{TITLES[step]}  ->  {folder}", flush=True)
        started = time.monotonic()
        flags = begin(folder, command, later=later, fresh=args.fresh)
        run_step(command + flags, folder / "training.log", args, on_gpu=on_gpu)
        seconds[STEP_NAMES[step]] = time.monotonic() - started
        finish(folder, command, seconds[STEP_NAMES[step]], later=later)
    return seconds


def summarise(plan: Plan, seconds: dict[str, float]) -> dict:
    """Return the summary of the finished steps.

    It holds answers of the base, SFT and RLHF models to three prompts.
    """
    import torch

    from dschat.demo.sample_answers import greedy_answers

    started = time.monotonic()
    judge = None
    if plan.kind == "demo":
        from dschat.demo.reviews import sentiment_judge

        judge = sentiment_judge()
    models = {
        "base": plan.actor,
        "sft": str(plan.outputs[1]),
        "rlhf": str(plan.outputs[3] / "actor"),
    }
    first = sorted((plan.outputs[3] / "evaluation").glob("rollout_*.jsonl"))[0]
    prompts = [row["prompt"] for row in read_jsonl(first)[:3]]
    try:
        answers = {
            name: greedy_answers(path, prompts, max_new_tokens=20) for name, path in models.items()
        }
    except torch.OutOfMemoryError:
        print("no sample answers: a model does not fit on one device")
        prompts = []
        answers = {}
    samples = [
        {"prompt": prompt, **{name: texts[i] for name, texts in answers.items()}}
        for i, prompt in enumerate(prompts)
    ]
    summary = {
        "sft": supervised_section(plan.outputs[1], "eval/perplexity", "perplexity"),
        "reward": supervised_section(plan.outputs[2], "eval/accuracy", "accuracy"),
        "ppo": ppo_section(plan.outputs[3], judge=judge),
        "samples": samples,
        "models": {
            "base": plan.actor,
            "sft": str(plan.outputs[1]),
            "reward": str(plan.outputs[2]),
            "actor": str(plan.outputs[3] / "actor"),
            "critic": str(plan.outputs[3] / "critic"),
        },
        "hardware": hardware(),
        "versions": versions(),
    }
    summary["seconds"] = {**seconds, "summary": time.monotonic() - started}
    return summary


def main() -> None:
    """Run the pipeline and print its summary."""
    args = parse_args()
    import torch

    set_up_logging()
    on_gpu = torch.cuda.is_available()
    if not torch.accelerator.is_available():
        # Else every process of DeepSpeed warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    names = ("num_processes", "save_interval", "max_restarts", "hostfile")
    given = {name: getattr(args, name) for name in names}
    several = args.deployment_type == "multi_node"
    check_arguments(
        args.output_dir,
        num_gpus=None if several else torch.cuda.device_count(),
        several_hosts=several,
        **given,
    )
    started = time.monotonic()
    plan = make_plan(args)
    check_pair(args, plan)
    prepare = time.monotonic() - started
    build = build_ops(on_gpu=on_gpu)
    seconds = run_steps(args, plan, on_gpu=on_gpu)
    if not all((plan.outputs[step] / "finished.json").exists() for step in MAINS):
        return
    summary = summarise(plan, seconds)
    path = Path(args.output_dir) / "summary.json"
    total = sum(summary["seconds"].values())
    summary["seconds"]["total"] = total
    summary["seconds_not_counted"] = {"fetch_and_convert": prepare, "build_ops": build}
    write_json(path, summary)
    report = write_report(args.output_dir)
    print(summary_text(summary))
    print(
        f"not counted, needed once: downloading and converting {prepare:.0f} s, "
        f"building ops {build:.0f} s"
    )
    print(where_next(plan.kind, summary["models"], report=str(report), summary=str(path)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(
            "\nInterrupted. Run the same command again to continue with the step that was running."
        )
