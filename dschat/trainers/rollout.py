"""From prompts to experience: generation, scoring, rewards and advantages, without gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from dschat.algorithms.advantages import (
    batch_scaled,
    gae,
    group_advantages,
    length_adaptive_lam,
    overlong_penalty,
    shape_rewards,
)
from dschat.algorithms.importance import importance_weights
from dschat.algorithms.kl import kl_estimate
from dschat.algorithms.logprobs import full_kl
from dschat.algorithms.masks import last_index, masked_whiten, moments
from dschat.algorithms.types import Experience, PromptBatch
from dschat.config.ppo import PPOConfig
from dschat.config.ppo_objective import PPOObjective
from dschat.config.ppo_options import PPOSampling
from dschat.generation.decoding import Decoded
from dschat.generation.sampling import response_mask
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.trainers.answers import (
    AlignedTexts,
    align,
    answer_logits,
    answer_logprobs,
    answer_values,
    row_lengths,
)
from dschat.trainers.micro_batches import agreed_groups


@dataclass(frozen=True)
class SampledAnswers:
    """Prompts with sampled answers."""

    prompts: PromptBatch
    input_ids: torch.Tensor  # [B, P + R] int64
    attention_mask: torch.Tensor  # [B, P + R] int64
    response_mask: torch.Tensor  # [B, R] bool
    ended: torch.Tensor  # [B] bool; True: the answer ended with an EOS
    # [B, R] fp32: log-probabilities computed by the generator; None if it does not return them.
    sampled_logprobs: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids of the answers [B, R]."""
        return self.input_ids[:, self.prompts.input_ids.shape[1] :]

    def rows(self, index: torch.Tensor) -> "SampledAnswers":
        """Return the rows `index` [N] (int64), as a new batch."""
        sampled = self.sampled_logprobs
        return SampledAnswers(
            prompts=self.prompts.rows(index),
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            response_mask=self.response_mask[index],
            ended=self.ended[index],
            sampled_logprobs=None if sampled is None else sampled[index],
        )


def sampling_config(
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    sampling: PPOSampling = PPOSampling(),
    num_samples: int = 1,
) -> GenerationConfig:
    """Return a complete GenerationConfig, so that defaults of model and transformers do not apply.

    Args:
        max_new_tokens: length limit of an answer.
        eos_token_ids: the ids that end an answer.
        pad_token_id: fills rows after their end.
        sampling: default: plain softmax sampling at temperature 1.
        num_samples: answers to each prompt.
    """
    return GenerationConfig(
        do_sample=not sampling.greedy_rollouts,
        num_return_sequences=num_samples,
        temperature=sampling.temperature,
        top_k=None if sampling.greedy_rollouts else sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=1.0,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=sampling.min_answer_len,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )


def generate(
    generator, batches: list[PromptBatch], *, generation: GenerationConfig
) -> list[SampledAnswers]:
    """Sample `generation.num_return_sequences` answers to each prompt of all batches.

    Args:
        generator: has ``decode_all(batches, generation) -> list[Decoded]``; see
            engine/hybrid_engine.py.
        batches: prompts on the generator's device.
        generation: from ``sampling_config``.

    Returns:
        Answers, batch by batch; those to one prompt are adjacent rows.
    """
    pairs = [(prompts.input_ids, prompts.attention_mask) for prompts in batches]
    decoded = generator.decode_all(pairs, generation)
    return [
        _answers(prompts, found, generation)
        for prompts, found in zip(batches, decoded, strict=True)
    ]


def _answers(
    prompts: PromptBatch, decoded: Decoded, generation: GenerationConfig
) -> SampledAnswers:
    """Return one batch of prompts with the answers that a generator has decoded for them."""
    copies = torch.arange(len(prompts.index), device=prompts.index.device)
    prompts = prompts.rows(copies.repeat_interleave(generation.num_return_sequences))
    mask = response_mask(decoded.tokens, generation.eos_token_id)
    # A generator may continue after the last answer has ended.
    longest = int(mask.sum(-1).max())
    tokens = decoded.tokens[:, :longest]
    mask = mask[:, :longest]
    tokens = torch.where(mask, tokens, torch.full_like(tokens, generation.pad_token_id))
    final = tokens.gather(-1, last_index(mask)[:, None]).squeeze(-1)
    return SampledAnswers(
        prompts=prompts,
        input_ids=torch.cat([prompts.input_ids, tokens], dim=-1),
        attention_mask=torch.cat([prompts.attention_mask, mask.long()], dim=-1),
        response_mask=mask,
        ended=torch.isin(final, torch.tensor(generation.eos_token_id, device=final.device)),
        sampled_logprobs=None if decoded.logprobs is None else decoded.logprobs[:, :longest],
    )


def parts_by_length(
    answers: SampledAnswers, *, tokens: int
) -> list[tuple[torch.Tensor, SampledAnswers | AlignedTexts]]:
    """Divide answers into parts of like length, with aligned rows.

    Every rank must call it; all get as many parts.

    Args:
        answers: of one batch.
        tokens: most tokens of a part, padding included; 0: one part, as it is.

    Returns:
        The rows [N] int64 of each part, and its answers.
    """
    device = answers.ended.device
    if not tokens:
        return [(torch.arange(len(answers.ended), device=device), answers)]
    lengths = row_lengths(answers)
    (groups,) = agreed_groups([[sum(parts) for parts in lengths]], tokens=tokens, device=device)
    parts: list[tuple[torch.Tensor, SampledAnswers | AlignedTexts]] = []
    for group in groups:
        rows = torch.tensor(group).to(device, non_blocking=True)
        parts.append((rows, align(answers.rows(rows), [lengths[row] for row in group])))
    return parts


def join_parts(
    answers: SampledAnswers,
    parts: list[tuple[torch.Tensor, SampledAnswers | AlignedTexts]],
    forward: Callable[[SampledAnswers | AlignedTexts], torch.Tensor],
) -> torch.Tensor:
    """Return the results of `forward` on all parts, in the order of the rows.

    Args:
        answers: of one batch.
        parts: those of `answers`, from ``parts_by_length``.
        forward: returns [N] or [N, R] of a part; R may differ between parts.

    Returns:
        [B] or [B, R]; 0 after the longest answer of a part.
    """
    results = [forward(part) for _, part in parts]
    if parts[0][1] is answers:
        return results[0]
    joined = results[0].new_zeros(answers.response_mask.shape[: results[0].dim()])
    for (rows, _), found in zip(parts, results, strict=True):
        if found.dim() == 2:
            joined[rows, : found.shape[1]] = found
        else:
            joined[rows] = found
    return joined


def make_experience(
    engines,
    answers: SampledAnswers,
    scores: torch.Tensor,
    *,
    config: PPOConfig,
    score_std: float,
    kl_coef: float,
) -> Experience:
    """Compute everything that updates read from scored answers.

    Advantages are not whitened yet: that takes all batches of the rollout, see ``whiten``.

    Args:
        engines: actor, ref and critic engines (``DeepSpeedRLHFEngine``).
        answers: of one batch.
        scores: [B], not yet divided by `score_std`.
        config: of the run.
        score_std: divisor of the scores, before they are clipped.
        kl_coef: weight of the KL penalty.
    """
    mask = answers.response_mask
    parts = parts_by_length(answers, tokens=config.batch.scoring_tokens_per_batch)
    temperature = config.sampling.temperature
    engines.eval()
    with torch.no_grad():
        # The logits of one model at a time: those of both would be the memory peak.
        logprobs = join_parts(
            answers,
            parts,
            lambda part: answer_logprobs(engines.actor, part, temperature=temperature)[0],
        )
        ref_logprobs = logprobs
        if config.has_reference:
            ref_logprobs = join_parts(
                answers,
                parts,
                lambda part: answer_logprobs(engines.ref, part, temperature=temperature)[0],
            )
        zeros = torch.zeros_like(logprobs)
        values = zeros
        if config.has_critic:
            values = join_parts(answers, parts, lambda part: answer_values(engines.critic, part))
        kl = kl_estimate(logprobs, ref_logprobs, config.ppo.kl_estimator)
        rewards = shape_rewards(
            scores / score_std,
            kl,
            mask,
            kl_coef=kl_coef if config.objective.kl_in == "reward" else 0.0,
            reward_clip=config.ppo.reward_clip,
            penalties=_answer_penalties(answers, config).to(kl.dtype),
        )
        advantages, returns = _advantages(rewards, values, mask, config)
    loss_mask = mask
    if config.objective.mask_truncated:
        loss_mask = mask & answers.ended[:, None]
    return Experience(
        input_ids=answers.input_ids,
        attention_mask=answers.attention_mask,
        response_mask=mask,
        loss_mask=loss_mask,
        importance=torch.ones_like(zeros),
        logprobs=torch.where(mask, logprobs, zeros),
        ref_logprobs=torch.where(mask, ref_logprobs, zeros),
        values=torch.where(mask, values, zeros),
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        scores=scores,
    )


def _answer_penalties(answers: SampledAnswers, config: PPOConfig) -> torch.Tensor:
    """Return what is subtracted from each score [B]: for a missing end, and for length."""
    options = config.objective
    missing = config.ppo.missing_eos_penalty * (~answers.ended).float()
    return missing + overlong_penalty(
        answers.response_mask.sum(-1),
        max_length=config.data.max_answer_seq_len,
        buffer=options.overlong_buffer,
        penalty=options.overlong_penalty,
    )


def _advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, config: PPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns [B, R], by the run's estimator."""
    ppo = config.ppo
    options = config.objective
    if not config.has_critic:
        advantages = group_advantages(
            rewards,
            mask,
            estimator=ppo.advantage_estimator,
            num_samples=config.batch.num_samples_per_prompt,
            gamma=ppo.gamma,
            scale=options.advantage_scale,
        )
        return advantages, advantages
    lam: float | torch.Tensor = ppo.lam
    if options.lam_alpha is not None:
        lam = length_adaptive_lam(mask.sum(-1), alpha=options.lam_alpha)
    advantages, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=lam)
    if options.critic_lam is not None:
        _, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=options.critic_lam)
    return advantages, returns


def correct_importance(
    pieces: list[Experience], answers: list[SampledAnswers], options: PPOObjective
) -> tuple[list[Experience], dict[str, float]]:
    """Weight tokens by what the trainer computes over what the generator computed.

    Args:
        pieces: the experience of each batch of answers.
        answers: the batches, with the generator's log-probabilities.
        options: the objective.

    Returns:
        The pieces with their weights, and metrics over all ranks: "rollout/importance_mean" and
        "_max" of the weights before the bound, "_ess" (their effective sample size, as a share of
        the tokens), and "_bounded" (share of tokens whose weight was changed).
    """
    corrected = []
    sums = []
    largest = []
    for piece, batch in zip(pieces, answers, strict=True):
        weights, stats = importance_weights(
            piece.logprobs,
            batch.sampled_logprobs,
            piece.response_mask,
            correction=options.importance_correction,
            level=options.importance_level,
            cap=options.importance_cap,
        )
        corrected.append(replace(piece, importance=weights))
        tokens = piece.response_mask.sum().double()
        sums.append(torch.stack([tokens, stats["sum"], stats["squares"], stats["bounded"]]))
        largest.append(stats["max"])
    tokens, total, squares, bounded = dist.all_reduce(torch.stack(sums).sum(0)).tolist()
    return corrected, {
        "rollout/importance_mean": total / tokens,
        "rollout/importance_max": dist.all_reduce(torch.stack(largest).max(), "max").item(),
        "rollout/importance_ess": total * total / (tokens * squares),
        "rollout/importance_bounded": bounded / tokens,
    }


def scale_by_batch(experience: Experience) -> Experience:
    """Divide advantages by the standard deviation of all answers' rewards, over all ranks."""
    totals = experience.rewards.sum(-1)
    everything = dist.all_reduce(moments(totals, torch.ones_like(totals)))
    return replace(experience, advantages=batch_scaled(experience.advantages, everything))


def whiten(experience: Experience) -> Experience:
    """Normalize advantages to mean 0 and deviation 1 over the learned tokens of all ranks."""
    totals = dist.all_reduce(moments(experience.advantages, experience.loss_mask))
    return replace(
        experience,
        advantages=masked_whiten(experience.advantages, experience.loss_mask, totals),
    )


def concatenate(experiences: list[Experience], *, pad_token_id: int) -> Experience:
    """Concatenate the rows of experiences.

    Prompts are padded on the left and answers on the right, to the longest of each.
    """
    if len(experiences) == 1:
        return experiences[0]
    num_answer = max(e.response_mask.shape[1] for e in experiences)
    num_prompt = max(e.input_ids.shape[1] - e.response_mask.shape[1] for e in experiences)
    columns: dict[str, list[torch.Tensor]] = {}
    for e in experiences:
        right = num_answer - e.response_mask.shape[1]
        left = num_prompt + num_answer - right - e.input_ids.shape[1]
        for name, tensor in vars(e).items():
            if name in ("input_ids", "attention_mask"):
                fill = pad_token_id if name == "input_ids" else 0
                tensor = F.pad(tensor, (left, right), value=fill)
            elif tensor.dim() == 2:
                tensor = F.pad(tensor, (0, right))
            columns.setdefault(name, []).append(tensor)
    return Experience(**{name: torch.cat(tensors) for name, tensors in columns.items()})


def exact_kl(engines, answers: SampledAnswers) -> torch.Tensor:
    """Return KL(policy || reference) over the whole vocabulary, summed over each answer.

    Returns:
        [B] fp32, in nats.
    """
    inputs = (answers.input_ids, answers.attention_mask, answers.tokens.shape[1])
    with torch.no_grad():
        kl = full_kl(answer_logits(engines.actor, *inputs), answer_logits(engines.ref, *inputs))
    return torch.where(answers.response_mask, kl, torch.zeros_like(kl)).sum(-1)


def print_answers(batches: list[SampledAnswers], scores: torch.Tensor, tokenizer) -> None:
    """Print prompts, answers and scores of all ranks, in the order of ranks, on rank 0.

    Args:
        batches: the answers of this rank.
        scores: [B], of the rows of all batches.
        tokenizer: the actor's.
    """
    start = 0
    for batch in batches:
        rows = slice(start, start + len(batch.ended))
        start = rows.stop
        columns = (
            batch.prompts.input_ids,
            batch.prompts.attention_mask,
            batch.tokens,
            batch.response_mask.long(),
        )
        # Row i of rank r is gathered to i * world size + r.
        gathered = [dist.gather_rows(column).cpu() for column in columns]
        gathered_scores = dist.gather_rows(scores[rows]).tolist()
        if not dist.is_main():
            continue
        for rank in range(dist.world_size()):
            for i in range(rank, len(gathered_scores), dist.world_size()):
                prompt_ids, prompt_mask, answer_ids, mask = (column[i] for column in gathered)
                prompt = tokenizer.decode(prompt_ids[prompt_mask.bool()], skip_special_tokens=True)
                answer = tokenizer.decode(answer_ids[mask.bool()], skip_special_tokens=False)
                logger.info(
                    f"rank {rank}  score {gathered_scores[i]:.3f}\n"
                    f"  prompt: {prompt!r}\n  answer: {answer!r}"
                )
