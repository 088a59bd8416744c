"""Functions for the worker: updates on one fixed rollout, and checks of sampled rollouts."""

from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from experience import ENTROPY_COEF, PAD, PTX_COEF, ptx_mask
from safetensors.torch import load_file, save_file

from dschat.algorithms.masks import masked_whiten
from dschat.algorithms.types import Experience, PromptBatch, TextBatch
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.data.collate import pad
from dschat.engine import build
from dschat.engine.zero import full_tensors
from dschat.models.structure import pretrained
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist
from dschat.trainers import ppo
from dschat.trainers.answers import row_lengths, trim
from dschat.trainers.ppo_metrics import UpdateTotals
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine
from dschat.trainers.rollout import (
    concatenate,
    make_experience,
    parts_by_length,
    whiten,
)

COMMON = (
    "--num_warmup_steps 0 --lr_scheduler_type constant --dtype fp32 --max_answer_seq_len 7 "
    "--max_prompt_seq_len 12 "
    "--enable_ema --ema_decay 0.75"
)


def make_trainer(
    stock: str, flags: str, *, ptx=None, family: str = "llama", start: str = "sft"
) -> ppo.DeepSpeedPPOTrainer:
    """Build a trainer of START/FAMILY and reward/FAMILY."""
    models = (
        f"--actor_model_name_or_path {stock}/{start}/{family} "
        f"--critic_model_name_or_path {stock}/reward/{family}"
    )
    config = parse_config(PPOConfig, f"{models} {COMMON} {flags}".split())
    tokenizer = load_tokenizer(config.model.actor_model_name_or_path)
    critic_tokenizer = load_tokenizer(config.model.critic_model_name_or_path)
    engines = DeepSpeedRLHFEngine(config, tokenizer=tokenizer, dtype="fp32", total_steps=4)
    engines.build_critic(tokenizer=critic_tokenizer, score_std=1.0)
    return ppo.DeepSpeedPPOTrainer(
        engines,
        config,
        lambda answers: answers.response_mask.sum(-1).float(),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
        ptx=ptx,
    )


def update(
    stock: str,
    out: str,
    *,
    rows: int,
    accumulation: int,
    zero: int,
    sgd: bool,
    fill: int = PAD,
    wider: bool = False,
    trimmed: bool = True,
    tokens: int = 0,
    with_ptx: bool = False,
    family: str = "llama",
) -> dict:
    """Take one optimizer step on the fixed rollout.

    Writes OUT/{gradients,changes,ema}.safetensors of both models.

    Args:
        rows: of each process in a micro-batch.
        sgd: plain gradient descent of rate 1 without clipping, instead of AdamW of rate 1e-3.
        fill: the token at positions that are not attended.
        wider: add columns on both sides that are not attended.
        trimmed: drop the columns of micro-batches that are not attended, as in training.
        tokens: of a micro-batch, which then has rows of like length.
    """
    flags = (
        f"--actor_zero_stage {zero} --critic_zero_stage {zero} "
        f"--per_device_training_batch_size {rows}"
    )
    flags += (
        f" --per_device_generation_batch_size {rows * accumulation} "
        f"--gradient_accumulation_steps {accumulation}"
    )
    flags += f" --actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --unsup_coef {PTX_COEF}"
    flags += f" --entropy_coef {ENTROPY_COEF} --training_tokens_per_batch {tokens}"
    if sgd:
        flags += f" --deepspeed_config {stock}/sgd.json"
    texts = load_file(f"{stock}/ptx.safetensors")["texts"]
    ptx = (
        (TextBatch(t, ptx_mask(t), torch.where(ptx_mask(t) == 1, t, -100)) for t in texts)
        if with_ptx
        else None
    )
    adamw = build.adamw
    check_gradients = ppo.GradientCheck
    gradients = {}

    def noting_gradients(*engines, measured):
        gradients.update(zip(("actor", "critic"), map(full_gradients, engines)))
        return check_gradients(*engines, measured=measured)

    try:
        build.adamw = gradient_descent if sgd else adamw
        ppo.GradientCheck = noting_gradients
        trainer = make_trainer(stock, flags, ptx=ptx, family=family)
        before = both_weights(trainer)
        whole = fixed_rollout(stock, family=family, fill=fill, wider=wider)
        mine = whole.rows(torch.arange(dist.rank(), len(whole.scores), dist.world_size()))
        kept = {name: tensor.clone() for name, tensor in vars(mine).items()}
        window = [mine.rows(index) for index in torch.arange(len(mine.scores)).split(rows)]
        if trimmed:
            window = [trimmed_rows(batch) for batch in window]
        if tokens:
            (window,) = trainer._windows(mine)
        trainer.engines.train()
        trainer.optimizer_step(window, UpdateTotals())
    finally:
        build.adamw = adamw
        ppo.GradientCheck = check_gradients
    after = both_weights(trainer)
    average = trainer.ema.full_tensors()
    if dist.is_main():
        Path(out).mkdir(parents=True)
        moved = {
            role: {name: after[role][name] - before[role][name] for name in before[role]}
            for role in before
        }
        average = {
            "actor": {name: tensor - before["actor"][name] for name, tensor in average.items()}
        }
        for name, tensors in (("gradients", gradients), ("changes", moved), ("ema", average)):
            flat = {
                f"{role}.{key}": tensor.contiguous()
                for role in tensors
                for key, tensor in tensors[role].items()
            }
            save_file(flat, f"{out}/{name}.safetensors")
    return {
        "frozen": all(torch.equal(tensor, kept[name]) for name, tensor in vars(mine).items()),
        "open_micro_steps": [
            engine.micro_steps - len(window) for engine in trainer.engines.trained
        ],
    }


def fixed_rollout(
    stock: str, *, family: str = "llama", fill: int = PAD, wider: bool = False
) -> Experience:
    """Load the Experience that `experience.py` wrote."""
    tensors = load_file(f"{stock}/experience-{family}.safetensors")
    if wider:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = F.pad(
                    tensor, (3 if name in ("input_ids", "attention_mask") else 0, 2)
                )
    live = tensors["attention_mask"].bool()
    tensors["input_ids"] = torch.where(
        live, tensors["input_ids"], torch.full_like(tensors["input_ids"], fill)
    )
    mask = tensors["response_mask"]
    return Experience(loss_mask=mask, importance=mask.float(), **tensors)


def trimmed_rows(experience: Experience) -> Experience:
    return trim(experience, row_lengths(experience))


def gradient_descent(model, **_) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def full_gradients(engine) -> dict[str, torch.Tensor]:
    """Return the whole reduced gradient of every parameter, as the optimizer is about to use it."""
    read = (
        safe_get_full_grad if engine.zero_optimization_stage() else lambda parameter: parameter.grad
    )
    return {
        name: read(parameter).clone()
        for name, parameter in pretrained(engine.module).named_parameters()
    }


def both_weights(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Copy the whole weights of both models, on rank 0."""
    models = {"actor": trainer.engines.actor.module, "critic": trainer.engines.critic.module.model}
    return {
        role: {name: t.clone() for name, t in full_tensors(model).items()}
        for role, model in models.items()
    }


def whitening(stock: str) -> dict:
    """Return the distance of this rank's whitened advantages to those of the rollout whitened at
    once.
    """
    whole = fixed_rollout(stock)
    mine = torch.arange(dist.rank(), len(whole.scores), dist.world_size())
    expected = masked_whiten(whole.advantages, whole.response_mask)
    alone = masked_whiten(whole.advantages[mine], whole.response_mask[mine])
    return {
        "error": (whiten(whole.rows(mine)).advantages - expected[mine]).abs().max().item(),
        "alone": (alone - expected[mine]).abs().max().item(),
    }


def rollout(stock: str, *, family: str, zero: int) -> dict:
    """Check a sampled rollout; every entry of the result should be true."""
    flags = (
        f"--actor_zero_stage {zero} --critic_zero_stage {zero} --per_device_generation_batch_size 8"
    )
    trainer = make_trainer(
        stock, f"{flags} --per_device_training_batch_size 8 --max_answer_seq_len 20", family=family
    )
    eos = trainer.generation.eos_token_id
    pad_id = trainer.pad_token_id
    draw = torch.Generator().manual_seed(dist.rank())
    texts = [torch.randint(3, 259, (n,), generator=draw).tolist() for n in (3, 8, 5, 8, 4, 6, 7, 8)]
    ids, mask = pad(texts, pad_id, left=True)
    move_away(trainer.engines.actor)
    torch.manual_seed(dist.rank())
    experience, (answers,), metrics = trainer.generate_experience(
        [PromptBatch(ids, mask, torch.arange(8))]
    )
    lengths = [first_end(row, eos) for row in answers.tokens.tolist()]
    live = torch.arange(answers.tokens.shape[1]) < torch.tensor(lengths)[:, None]
    ratio_error = largest_ratio_error(trainer, experience)
    raw = make_experience(
        trainer.engines,
        answers,
        trainer.rewards(answers),
        config=trainer.config,
        score_std=1.0,
        kl_coef=0.3,
    )
    other = torch.where(
        answers.attention_mask.bool(), answers.input_ids, torch.full_like(answers.input_ids, 99)
    )
    perturbed = make_experience(
        trainer.engines,
        replace(answers, input_ids=other),
        trainer.rewards(answers),
        config=trainer.config,
        score_std=1.0,
        kl_coef=0.3,
    )
    by_k3 = replace(trainer.config, ppo=replace(trainer.config.ppo, kl_estimator="k3"))
    k3 = make_experience(
        trainer.engines, answers, trainer.rewards(answers), config=by_k3, score_std=1.0, kl_coef=0.3
    )
    # 35 tokens hold one or two answers, so that ranks differ in the parts that they need.
    batch = replace(trainer.config.batch, scoring_tokens_per_batch=35)
    in_parts = make_experience(
        trainer.engines,
        answers,
        trainer.rewards(answers),
        config=replace(trainer.config, batch=batch),
        score_std=1.0,
        kl_coef=0.3,
    )
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "scores")
    kl = raw.logprobs - raw.ref_logprobs
    score = torch.tensor(lengths).float().clamp(-5, 5)
    on_last = F.one_hot(torch.tensor(lengths) - 1, live.shape[1]) * score[:, None]
    whole = concatenate([raw, fixed_rollout(stock)], pad_token_id=pad_id)
    return {
        "some end early": len(set(lengths)) > 1
        and torch.equal(answers.ended, ends(answers.tokens, lengths, eos)),
        "mask ends with the first EOS": torch.equal(answers.response_mask, live),
        "attention is prompt and answer": torch.equal(
            answers.attention_mask, torch.cat([mask, live.long()], -1)
        ),
        "prompts unchanged": torch.equal(answers.input_ids[:, : ids.shape[1]], ids),
        "nothing after the end": all(not getattr(raw, n)[~live].any() for n in names[:-1]),
        "what is after the end is not read": all(
            torch.equal(getattr(raw, n), getattr(perturbed, n)) for n in names
        ),
        "parts of like length score the same": len(parts_by_length(answers, tokens=35)) > 2
        and all(
            torch.allclose(getattr(raw, n), getattr(in_parts, n), rtol=1e-5, atol=1e-5)
            for n in names
        ),
        "KL on each token, score on the last": torch.allclose(
            raw.rewards, -0.3 * kl + on_last, atol=1e-6
        ),
        "k3 is the estimate if it is asked for": torch.allclose(
            k3.rewards, -0.3 * torch.where(live, (-kl).exp() - 1 + kl, 0.0) + on_last, atol=1e-6
        ),
        "the policy has moved": kl.abs().max().item() > 1e-3,
        "advantages whitened": abs(metrics["advantage/std"] - 1) > 1e-3 and is_white(experience),
        "rows survive concatenation": torch.equal(
            trimmed_rows(whole.rows(torch.arange(8))).input_ids, raw.input_ids
        ),
        "the ratio is 1 before the first update": ratio_error < 1e-5,
        "no gradient": not any(tensor.requires_grad for tensor in vars(experience).values()),
    }


def largest_ratio_error(trainer, experience: Experience) -> float:
    """Return the largest |ratio - 1| of the answer tokens in the first minibatch of the policy
    loss.
    """
    seen = []
    policy_loss = ppo.policy_loss

    def noting(logprobs, old_logprobs, advantages, mask, **options):
        seen.append((logprobs - old_logprobs).detach().exp().sub(1)[mask].abs().max().item())
        return policy_loss(logprobs, old_logprobs, advantages, mask, **options)

    trainer.engines.train()
    try:
        ppo.policy_loss = noting
        trainer._actor_loss(next(trainer._windows(experience))[0])
    finally:
        ppo.policy_loss = policy_loss
    return seen[0]


def move_away(engine) -> None:
    """Change the actor a little, so that it differs from the reference."""
    parameters = list(engine.module.parameters())
    with (
        deepspeed.zero.GatheredParameters(
            [p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0
        ),
        torch.no_grad(),
    ):
        draw = torch.Generator().manual_seed(3)
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))


def first_end(tokens: list[int], eos: list[int]) -> int:
    """Return the length of an answer up to and including its first end token."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))


def ends(tokens: torch.Tensor, lengths: list[int], eos: list[int]) -> torch.Tensor:
    return torch.tensor([row[length - 1] in eos for row, length in zip(tokens.tolist(), lengths)])


def is_white(experience: Experience) -> bool:
    """Return whether mean is 0 and deviation 1 over the answer tokens of all ranks."""
    mine = experience.advantages[experience.response_mask].double()
    count, total, squares = dist.all_reduce(
        torch.stack([torch.ones_like(mine), mine, mine**2]).sum(-1)
    ).tolist()
    return abs(total / count) < 1e-5 and abs(squares / count - 1) < 1e-4
