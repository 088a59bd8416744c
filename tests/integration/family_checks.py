"""Functions for the worker: the steps on miniatures of the families of transformers."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from dschat.checkpoint.save_model import save_model
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist
from tests.tiny_families import tiny_family_model

# ZeRO's stage, and whether LoRA trains.
SETTINGS = {"zero2": (2, False), "zero3": (3, False), "lora2": (2, True), "lora3": (3, True)}
SHARES = {1: "1,0,0", 2: "0,1,0", "dpo": "0,1,0"}
ANSWER_TOKENS = 8


def train_family(stock: str, *, family: str, step: int | str, setting: str, out: str) -> dict:
    """Run two updates of a step on a miniature; all entries should be true."""
    from worker import run_main  # here, as it imports DeepSpeed and tests read SETTINGS

    start = write_family(stock, family, f"{out}-start", reward=step == 3)
    run_main(step, argv=flags(stock, start, step, setting), out=out)
    if not dist.is_main():
        return {}
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    trained = {"actor": start, "critic": f"{start}-reward"} if step == 3 else {"": start}
    return {
        "numbers are finite": all(math.isfinite(v) for line in lines for v in line.values()),
        **{
            f"weights of {role or 'the model'} changed": has_changed(before, f"{out}/{role}")
            for role, before in trained.items()
        },
    }


def flags(stock: str, start: str, step: int | str, setting: str) -> str:
    """Return the flags of two updates, in step 3 by turns with the Hybrid Engine."""
    zero, lora = SETTINGS[setting]
    pieces = f"--deepspeed_config {stock}/pieces.json" if zero == 3 else ""
    common = f"--data_path {stock}/toy --dtype fp32 --seed 7 --num_warmup_steps 0 {pieces}"
    if step != 3:
        adapters = "--lora_dim 2 --only_optimize_lora" if lora else ""
        return (
            f"{common} --model_name_or_path {start} --data_split {SHARES[step]} --max_seq_len 32 "
            f"--max_train_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 "
            f"--learning_rate 1e-3 --lr_scheduler_type constant --zero_stage {zero} {adapters}"
        )
    adapters = "--actor_lora_dim 2 --critic_lora_dim 2 --only_optimize_lora" if lora else ""
    hybrid = "--enable_hybrid_engine" if setting in ("zero2", "lora3") else ""
    return (
        f"{common} --actor_model_name_or_path {start} --critic_model_name_or_path {start}-reward "
        f"--data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len {ANSWER_TOKENS} "
        "--per_device_generation_batch_size 2 --per_device_training_batch_size 2 --eval_prompts 2 "
        "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --lr_scheduler_type constant "
        f"--actor_zero_stage {zero} --critic_zero_stage {zero} {adapters} {hybrid} "
        "--enable_test_mode --test_stop_step 2"
    )


def write_family(stock: str, family: str, path: str, *, reward: bool) -> str:
    """Write a miniature, and with `reward` a reward model of it; return the miniature's folder."""
    if dist.is_main():
        tokenizer = load_tokenizer(f"{stock}/sft/llama")
        tiny_family_model(family, std=0.1).save_pretrained(path)
        tokenizer.save_pretrained(path)
    dist.barrier()
    if reward:
        tokenizer = load_tokenizer(path)
        model = load_reward_model(path, dtype=torch.float32, tokenizer=tokenizer)
        save_model(model.model, tokenizer, f"{path}-reward")
    return path


def has_changed(before: str, after: str) -> bool:
    """Return whether two folders hold the same names of weights, of which one differs."""
    old, new = weights(before), weights(after)
    shared = set(old) & set(new)
    return len(shared) > 0.8 * len(old) and any(
        not torch.equal(old[name], new[name]) for name in shared
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights of a folder by the names that a language model has."""
    tensors = load_file(Path(folder, "model.safetensors"))
    # Gemma 3n's classifier, without a class of transformers, has another level.
    return {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
