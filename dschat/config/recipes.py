"""What e2e_rlhf.py runs: the flags of the three steps for the embedded default, the tiny models and the real sizes."""

import json
import os
import re
from pathlib import Path

from dschat.config.values import at_least

# Sizes that are known by their number alone, DeepSpeed-Chat's way of naming OPT.
OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
LLAMA2 = {f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")}
TINY = ("tiny-llama", "tiny-opt", "tiny-gpt2", "tiny-gpt_neox", "tiny-qwen2", "tiny-mistral")

# The embedded default: SmolLM2-135M-Instruct on film-review sentences. One row a step; the sizes were chosen so that
# a CPU run of two cores ends in ten minutes, and a GPU run, which has time to spare, learns longer.
DEMO_CPU = {
    1: "--learning_rate 2e-4 --freeze_layers 18 --per_device_train_batch_size 16 --per_device_eval_batch_size 32 "
    "--num_warmup_steps 2",
    2: "--learning_rate 1e-4 --freeze_layers 12 --per_device_train_batch_size 16 --per_device_eval_batch_size 32 "
    "--cut_fraction 0.5 --num_warmup_steps 4 --eval_iters 1000 --max_train_steps 48",
    3: "--actor_learning_rate 8e-5 --critic_learning_rate 8e-5 --actor_freeze_layers 18 --critic_freeze_layers 18 "
    "--per_device_generation_batch_size 32 --per_device_training_batch_size 16 --ppo_epochs 2 "
    "--per_device_eval_batch_size 64 --max_prompt_seq_len 32 --max_answer_seq_len 20 --kl_coef 0.1 "
    "--num_warmup_steps 2 --max_train_steps 12 --lr_scheduler_type constant_with_warmup --enable_hybrid_engine",
}
DEMO_GPU = {
    1: DEMO_CPU[1],
    2: "--learning_rate 1e-4 --freeze_layers 12 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 "
    "--cut_fraction 0.5 --num_warmup_steps 4 --eval_iters 1000",
    3: "--actor_learning_rate 2e-5 --critic_learning_rate 2e-5 --per_device_generation_batch_size 64 "
    "--per_device_training_batch_size 32 --ppo_epochs 2 --per_device_eval_batch_size 128 --max_prompt_seq_len 32 "
    "--max_answer_seq_len 20 --kl_coef 0.1 --num_warmup_steps 4 --max_train_steps 15 "
    "--lr_scheduler_type constant_with_warmup --enable_hybrid_engine --no_compile",
}
TINY_RUN = {
    1: "--learning_rate 1e-3 --per_device_train_batch_size 8 --max_seq_len 64 --max_train_steps 20 --dtype fp32",
    2: "--learning_rate 1e-3 --per_device_train_batch_size 8 --max_seq_len 64 --max_train_steps 20 --dtype fp32",
    3: "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --per_device_generation_batch_size 8 "
    "--per_device_training_batch_size 8 --max_prompt_seq_len 32 --max_answer_seq_len 16 --num_warmup_steps 0 "
    "--eval_prompts 32 --max_train_steps 8 --dtype fp32 --enable_hybrid_engine",
}
# One set for every published size. The launch scripts have DeepSpeed-Chat's own for each.
REAL = {
    1: "--learning_rate 9.65e-6 --num_train_epochs 1 --max_seq_len 512 --per_device_train_batch_size 4 "
    "--gradient_checkpointing --gradient_accumulation_steps 4",
    2: "--learning_rate 9.65e-6 --weight_decay 0.1 --num_train_epochs 1 --max_seq_len 512 "
    "--per_device_train_batch_size 4 --gradient_checkpointing --gradient_accumulation_steps 4",
    3: "--actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 --critic_weight_decay 0.1 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --max_prompt_seq_len 256 "
    "--max_answer_seq_len 256 --actor_gradient_checkpointing --critic_gradient_checkpointing --num_warmup_steps 100 "
    "--enable_hybrid_engine",
}


def check_arguments(
    output_dir: str,
    *,
    num_processes: int,
    num_gpus: int | None,
    save_interval: int,
    hostfile: str | None,
    several_hosts: bool = False,
) -> None:
    """Nothing where the run can start; makes the output folder.

    Args:
        num_processes: 0: as many as the deployment has.
        num_gpus: of this machine; None where others take part, whose GPUs it does not know.
        several_hosts: the deployment is multi_node.

    Raises:
        ValueError: it cannot; names every argument that is in the way.
    """
    found = at_least("--num-processes", num_processes, 0) + at_least("--save-interval", save_interval, 0)
    if num_gpus and num_processes > num_gpus:
        found.append(f"--num-processes {num_processes}: this machine shows {num_gpus} GPU(s). Give as many at most.")
    if several_hosts and num_processes > 0:
        found.append(f"--num-processes {num_processes}: with multi_node the hostfile says how many. Leave it out.")
    if hostfile and not Path(hostfile).is_file():
        found.append(f"--hostfile {hostfile}: no such file. Give DeepSpeed's, with a line \"HOST slots=8\" for each node.")
    elif hostfile and not several_hosts:
        found.append(f"--hostfile {hostfile}: hosts are for --deployment-type multi_node. Give that, or leave it out.")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(output_dir, os.W_OK) else "Permission denied"
    except OSError as error:
        fault = error.strerror
    if fault:
        found.append(f"--output-dir {output_dir}: no folder that can be written ({fault}). Give another.")
    if found:
        raise ValueError("\n".join(found))


def resolve_model(name: str) -> tuple[str, str]:
    """What a model name on the command line means.

    Returns:
        kind ("demo", "tiny" or "real") and, for "tiny", the family, for "real" a hub id or the folder as given.

    Raises:
        ValueError: neither a known size, nor a folder or hub id by its looks.
    """
    if name in ("", "smollm2", "smollm2-135m"):
        return "demo", "smollm2-135m"
    if name in TINY:
        return "tiny", name.removeprefix("tiny-")
    short = name.lower().removeprefix("facebook/").removeprefix("opt-")
    if short in OPT_SIZES:
        return "real", f"facebook/opt-{short}"
    if name.lower() in LLAMA2:
        return "real", LLAMA2[name.lower()]
    if "/" in name or name.startswith((".", "~")) or Path(name).is_dir():
        return "real", name
    raise ValueError(
        f"{name!r} is no known model: give one of {', '.join((*OPT_SIZES, *LLAMA2, *TINY))}, an existing folder or a hub "
        "id (owner/name)."
    )


def default_reward_model(actor: str) -> str:
    """What step 2 starts from where nothing is said: opt-350m beside an OPT actor, as in DeepSpeed-Chat, else the actor's own.

    In step 3 the critic starts from the reward model, and reads the actor's tokens.

    Args:
        actor: a hub id or a folder.
    """
    folder = Path(actor).expanduser()
    is_opt = re.search(r"(^|[-_/])opt-", actor.lower()) is not None
    if folder.is_dir():
        try:
            is_opt = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "opt"
        except (OSError, ValueError, LookupError, TypeError):  # step 1 says what is wrong with it
            is_opt = False
    return "facebook/opt-350m" if is_opt else actor


def size_name(name: str) -> str:
    """The folder name for a model below the output folder: its last path part, as a plain file name."""
    last = name.rstrip("/").split("/")[-1].removeprefix("opt-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).strip(".") or "model"


def step_flags(step: int, *, kind: str, on_gpu: bool, single_gpu: bool, actor_stage: str, reward_stage: str) -> list[str]:
    """The flags of a step, without its model, data and output paths.

    Args:
        kind: "demo", "tiny" or "real".
        single_gpu: one process.
        actor_stage, reward_stage: ZeRO stages; "" for the default, 0 with one process and 3 with more.
    """
    table = {"demo": DEMO_GPU if on_gpu else DEMO_CPU, "tiny": TINY_RUN, "real": REAL}[kind]
    words = table[step].split()
    default = "0" if single_gpu or kind != "real" else "3"
    actor, reward = actor_stage or default, reward_stage or default
    if step == 3:
        return words + ["--actor_zero_stage", actor, "--critic_zero_stage", reward]
    return words + ["--zero_stage", actor if step == 1 else reward]
