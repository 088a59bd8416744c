"""Functions for the worker: effects of flags of step 3 on sampling and on the optimizers."""

import torch
from ppo_checks import make_trainer

from dschat.algorithms.types import PromptBatch
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.trainers.rollout import generate, sampling_config


def samplings(stock: str, flags: list[str]) -> list[list[list[int]]]:
    """Return the answers with each of `flags` to the same prompts and seed, of a model with varied
    answers.
    """
    trainer = make_trainer(stock, "", start="steep")
    models = (
        f"--actor_model_name_or_path {stock}/steep/llama "
        f"--critic_model_name_or_path {stock}/reward/llama"
    )
    ids = torch.randint(3, 259, (8, 6), generator=torch.Generator().manual_seed(1))
    prompts = PromptBatch(ids, torch.ones_like(ids), torch.arange(8))
    trainer.engines.eval()
    found = []
    for words in flags:
        config = parse_config(PPOConfig, f"{models} --max_answer_seq_len 12 {words}".split())
        generation = sampling_config(
            max_new_tokens=12,
            eos_token_ids=tuple(trainer.generation.eos_token_id),
            pad_token_id=trainer.pad_token_id,
            sampling=config.sampling,
        )
        torch.manual_seed(2)
        (answers,) = generate(trainer.engines.generator, [prompts], generation=generation)
        found.append(answers.tokens.tolist())
    return found


def lora_rates(stock: str, flags: str) -> dict[str, list[float]]:
    """Return the learning rates of each optimizer's parameter groups."""
    engines = make_trainer(stock, flags).engines
    roles = {"actor": engines.actor, "critic": engines.critic}
    return {
        role: sorted({group["lr"] for group in engine.optimizer.param_groups})
        for role, engine in roles.items()
    }
