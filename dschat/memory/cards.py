"""A table of which model trains on which card, by the memory plan."""

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.memory.advice import GIB, needed_bytes
from dschat.memory.checks import checked_plan

CONFIGS = {"1": SFTConfig, "2": RewardConfig, "dpo": DPOConfig, "3": PPOConfig}
# Common cards by the name of their size, and the GiB that torch sees on the smallest so named: T4,
# A10, V100, A100, L40S, A100, H200.
CARDS_GIB = {16: 14.6, 24: 22.0, 32: 31.7, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}
MODELS = ("opt-1.3b", "llama-2-7b", "llama-2-13b", "opt-30b", "llama-2-70b")
# What trains, from most to least memory.
WAYS = {
    "all weights": "",
    "LoRA": "{lora} --only_optimize_lora",
    "LoRA on int8": "{lora} --only_optimize_lora --quantize_frozen int8",
    "LoRA on nf4": "{lora} --only_optimize_lora --quantize_frozen nf4",
}
LORA = {"1": "--lora_dim 16", "3": "--actor_lora_dim 16 --critic_lora_dim 16"}
FLAGS = {
    "1": "--zero_stage 2 --gradient_checkpointing --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 4",
    "3": "--actor_zero_stage 2 --critic_zero_stage 2 --actor_gradient_checkpointing "
    "--critic_gradient_checkpointing --per_device_training_batch_size 4 "
    "--per_device_generation_batch_size 4 --per_device_eval_batch_size 4 "
    "--enable_hybrid_engine --hybrid_lora attach",
}
# Step, model and way of the measured runs in docs/performance/memory.md that need no offload and
# have a critic of the actor's size in step 3.
MEASURED = {
    ("1", "llama-2-7b", "LoRA"),
    ("3", "llama-2-7b", "LoRA"),
    ("3", "llama-2-7b", "LoRA on int8"),
}


def needed_gib(step: str, model: str, way: str) -> float:
    """Return the planned GiB of a model on one GPU in bf16, without offload.

    Args:
        step: a key of CONFIGS; in step 3 the critic is as large as the actor.
        model: a published size.
        way: a key of WAYS.
    """
    names = ["--model_name_or_path", model]
    if step == "3":
        names = ["--actor_model_name_or_path", model, "--critic_model_name_or_path", model]
    kind = "3" if step == "3" else "1"
    words = f"{FLAGS[kind]} {WAYS[way].format(lora=LORA[kind])}".split()
    plan = checked_plan(parse_config(CONFIGS[step], names + words), world_size=1, dtype="bf16")
    return needed_bytes(plan) / GIB


def card_cell(step: str, model: str, way: str) -> str:
    """Return the smallest card for a model, and the planned GiB.

    A star says that a run of this kind has been measured.
    """
    gib = needed_gib(step, model, way)
    card = next((f"{size} GB" for size, most in CARDS_GIB.items() if gib <= most), "none")
    star = "*" if (step, model, way) in MEASURED else ""
    return f"{card} ({gib:.1f}){star}"


def cards_table() -> str:
    """Return a Markdown table of the smallest card for each step and model."""
    header = ["step", "model", *WAYS]
    lines = ["| " + " | ".join(header) + " |", "|-" * len(header) + "|"]
    for step in CONFIGS:
        for model in MODELS:
            cells = [card_cell(step, model, way) for way in WAYS]
            lines.append(f"| {step} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)
