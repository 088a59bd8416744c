"""PPO on DeepSpeed engines: generate experience, then learn from it.

PromptBatch -> generate -> SampledAnswers -> rewards -> make_experience -> Experience
    -> ppo_epochs x shuffled minibatches of policy_loss and value_loss (optionally a PTX loss).
"""

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from dschat.algorithms.kl import KLController, kl_estimate
from dschat.algorithms.losses import (
    aggregation_count,
    aggregation_weights,
    lm_loss_rows,
    policy_loss,
    value_loss,
)
from dschat.algorithms.masks import masked_sum
from dschat.algorithms.types import Experience, PromptBatch, TextBatch
from dschat.checkpoint.run_state import SavedState
from dschat.config.ppo import PPOConfig
from dschat.engine.ema import MovingAverage
from dschat.engine.optim import GradientCheck, gradient_norm
from dschat.models.forward import forward_logits
from dschat.models.routers import RouterWatch
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.tracking.progress import memory_gib, reported_work
from dschat.trainers.answers import (
    align_experience,
    answer_logprobs,
    answer_values,
    row_lengths,
    trim,
)
from dschat.trainers.dynamic_sampling import Scored, replace_equal_groups
from dschat.trainers.micro_batches import agreed_groups
from dschat.trainers.ppo_metrics import (
    UpdateTotals,
    equal_groups_metric,
    logprob_gap,
    rollout_metrics,
)
from dschat.trainers.rewards import WeightedRewards
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine
from dschat.trainers.rollout import (
    SampledAnswers,
    concatenate,
    correct_importance,
    generate,
    make_experience,
    sampling_config,
    scale_by_batch,
    whiten,
)
from dschat.trainers.router_loss import router_loss

WHITENED_ESTIMATORS = ("gae", "reinforce_baseline")


class TextBatches(Protocol):
    """Endless batches of general text."""

    digest: str  # a hash of the texts

    def __next__(self) -> TextBatch:
        """Return the next batch."""


class DeepSpeedPPOTrainer:
    """Proximal policy optimisation of the actor against rewards, with a critic and a KL penalty.

    With a critic-free --advantage_estimator the same loop runs without a critic.
    """

    def __init__(
        self,
        engines: DeepSpeedRLHFEngine,
        config: PPOConfig,
        rewards: Callable[[SampledAnswers], torch.Tensor],
        *,
        eos_token_ids: tuple[int, ...],
        pad_token_id: int,
        score_std: float = 1.0,
        ptx: TextBatches | None = None,
        extra_prompts: Callable[[int, int], PromptBatch] | None = None,
    ):
        """Set up training from the first rollout.

        Args:
            engines: actor, critic and reference engines, and the generator.
            config: of the run.
            rewards: SampledAnswers to scores [B].
            eos_token_ids: the ids that end an answer.
            pad_token_id: the actor's.
            score_std: scores are divided by it; one constant for the whole run.
            ptx: endless batches of general text for the PTX loss; None: no PTX loss.
            extra_prompts: draws further prompts, by rollout and number of the draw; needed with
                --dynamic_sampling. See ``ExtraPrompts``.
        """
        self.engines = engines
        self.config = config
        self.rewards = rewards
        self.score_std = score_std
        self.pad_token_id = pad_token_id
        self.ptx = ptx
        self.extra_prompts = extra_prompts
        self.generation = sampling_config(
            max_new_tokens=config.data.max_answer_seq_len,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            sampling=config.sampling,
            num_samples=config.batch.num_samples_per_prompt,
        )
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        self._rollout_kl_coef = self.kl.coef  # of the rollout that is learned from
        # The average starts from the master weights, which an evaluation may have left in host
        # memory.
        engines.train()
        coef = config.ppo.router_aux_loss_coef
        self._routers = RouterWatch(engines.actor.module, coef=coef) if coef else None
        self.ema = None
        if config.model.enable_ema:
            self.ema = MovingAverage(engines.actor, decay=config.model.ema_decay)
        self.rollouts = 0
        self._order = torch.Generator().manual_seed(config.run.seed + 7919 * dist.rank())

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the state that changes from rollout to rollout, engines excepted.

        See ``RunState``.
        """
        values = {"rollouts": self.rollouts, "kl_coef": self.kl.coef}
        return {"order": self._order.get_state()}, values

    def restore(self, saved: SavedState) -> None:
        """Restore the state that ``state`` returned."""
        tensors, values = saved.of_rank(None if saved.same_processes else 0)
        self.rollouts = values["rollouts"]
        self.kl.coef = values["kl_coef"]
        if saved.same_processes:
            self._order.set_state(tensors["order"])

    def generate_experience(
        self, batches: list[PromptBatch]
    ) -> tuple[Experience, list[SampledAnswers], dict[str, float]]:
        """Generate and score answers to all prompt batches: one rollout.

        Args:
            batches: the prompts of this rank.

        Returns:
            The Experience of all rows of this rank, with whitened advantages; the answers, batch
            by batch; and metrics over all ranks.

        Raises:
            ValueError: every answer is empty, or the KL is not finite.
            RewardFailure: a reward failed.
        """
        started = time.monotonic()
        self.engines.eval()
        scored, sampling = self._sample_and_score(batches)
        answers = [batch for batch, _ in scored]
        pieces = [
            make_experience(
                self.engines,
                batch,
                scores,
                config=self.config,
                score_std=self.score_std,
                kl_coef=self.kl.coef,
            )
            for batch, scores in scored
        ]
        gap = logprob_gap(
            [
                (piece.logprobs, batch.sampled_logprobs, piece.response_mask)
                for piece, batch in zip(pieces, answers, strict=True)
            ]
        )
        if self.config.objective.importance_correction != "none":
            pieces, weights = correct_importance(pieces, answers, self.config.objective)
            gap |= weights
        experience = concatenate(pieces, pad_token_id=self.pad_token_id)
        if self.config.objective.advantage_scale == "batch":
            experience = scale_by_batch(experience)
        ended = torch.cat([batch.ended for batch in answers])
        metrics = rollout_metrics(
            experience,
            ended,
            score_std=self.score_std,
            reward_clip=self.config.ppo.reward_clip,
            has_critic=self.config.has_critic,
            has_reference=self.config.has_reference,
        )
        metrics["kl_coef"] = self._rollout_kl_coef = self.kl.coef
        self._check_rollout(metrics)
        if self.config.has_reference:
            self.kl.update(metrics["objective/kl"], len(ended) * dist.world_size())
        is_whitened = self.config.ppo.advantage_estimator in WHITENED_ESTIMATORS
        if is_whitened and self.config.ppo.whiten_advantages:
            experience = whiten(experience)
        metrics["time/score_s"] = time.monotonic() - started - sampling["time/generate_s"]
        metrics |= sampling | gap | self.engines.generator.metrics()
        return experience, answers, metrics

    def _sample_and_score(
        self, batches: list[PromptBatch]
    ) -> tuple[list[Scored], dict[str, float]]:
        """Sample and score answers; with --dynamic_sampling replace groups of equal scores.

        Returns:
            Batches of answers with their scores, and metrics.
        """
        device, generator = self.engines.actor.device, self.engines.generator
        num_samples = self.config.batch.num_samples_per_prompt
        objective = self.config.objective
        seconds = 0.0

        def sample(prompts: list[PromptBatch]) -> list[Scored]:
            nonlocal seconds
            started = time.monotonic()
            prompts = [batch.to(device) for batch in prompts]
            name = f"PPO  rollout {self.rollouts + 1}"
            with reported_work(name, interval_s=self.config.run.log_interval_s):
                answers = generate(generator, prompts, generation=self.generation)
            generator.end_rollout()
            seconds += time.monotonic() - started
            return [(batch, self.rewards(batch)) for batch in answers]

        scored = sample(batches)
        metrics: dict[str, float] = {}
        if num_samples > 1:
            metrics |= equal_groups_metric([scores for _, scores in scored], num_samples)
        if objective.dynamic_sampling:
            assert self.extra_prompts is not None
            draw = partial(self.extra_prompts, self.rollouts + 1)
            scored, replaced = replace_equal_groups(
                scored,
                lambda number: sample([draw(number)])[0],
                num_samples=num_samples,
                max_extra=objective.max_extra_rollouts,
                pad_token_id=self.pad_token_id,
            )
            metrics |= replaced
        metrics["time/generate_s"] = seconds
        if isinstance(self.rewards, WeightedRewards):
            metrics |= self.rewards.pop_metrics(device)
        return scored, metrics

    def train_rlhf(self, experience: Experience) -> dict[str, float]:
        """Train on a rollout: `ppo_epochs` passes in shuffled minibatches.

        Returns:
            Metrics over all ranks.
        """
        started = time.monotonic()
        self.engines.train()
        roles = {"actor": self.engines.actor, "critic": self.engines.critic}
        # Read before the first update: each update advances the schedule.
        rates = {role: engine.get_lr()[0] for role, engine in roles.items() if engine is not None}
        totals = UpdateTotals()
        for window in self._windows(experience):
            if self.optimizer_step(window, totals):
                break
        self.rollouts += 1
        metrics = totals.means()
        for role, engine in roles.items():
            if engine is not None:
                metrics[f"grad_norm/{role}"] = gradient_norm(engine)
                metrics[f"lr/{role}"] = rates[role]
        return {
            **metrics,
            "time/train_s": time.monotonic() - started,
            "perf/mem_gib": memory_gib()[0],
        }

    def optimizer_step(self, window: list[Experience], totals: UpdateTotals) -> bool:
        """Run one update of actor and critic on the micro-batches of `window`.

        Returns:
            True if --target_kl ends the updates on this rollout.

        Raises:
            ValueError: a loss is not finite; the weights are as before.
        """
        counts = [
            torch.stack([batch.loss_mask.sum(), self._policy_count(batch)]) for batch in window
        ]
        # At least 1: --mask_truncated may leave nothing to learn, and the losses are 0 then.
        tokens, policy_count = dist.all_reduce(torch.stack(counts).sum(0)).clamp(min=1)
        actor, critic = self.engines.actor, self.engines.critic
        # DeepSpeed averages gradients over ranks and divides by the accumulation steps; undo both.
        undo = dist.world_size() * actor.gradient_accumulation_steps()
        warming_up = self.config.has_critic and self.rollouts < self.config.ppo.critic_warmup_steps
        learning = [critic] if warming_up else self.engines.trained
        approx_kl = torch.zeros((), device=tokens.device)
        losses: dict[str, torch.Tensor] = {}  # sums of this rank, by name
        for number, batch in enumerate(window, 1):
            is_last = number == len(window)
            if actor in learning:
                loss, sums, ratio_max = self._actor_loss(batch)
                _add(losses, "policy", loss)
                num_ptx = self._ptx_batches(is_last=is_last)
                _backward(actor, loss * undo / policy_count, is_last=is_last and not num_ptx)
                for left in reversed(range(num_ptx)):
                    loss_of_text = self._ptx_loss(totals, losses, undo)
                    _backward(actor, loss_of_text, is_last=is_last and not left)
                totals.add({"policy/loss": loss}, self._policy_count(batch))
                totals.add(sums, batch.loss_mask.sum(), ratio_max)
                approx_kl += sums["policy/approx_kl"]
            if critic is not None:
                loss, sums = self._critic_loss(batch)
                _add(losses, "value", loss)
                _backward(critic, loss * undo / tokens, is_last=is_last)
                totals.add(sums, batch.loss_mask.sum())
            if not is_last:
                for engine in learning:
                    engine.step()
        roles = {"policy": actor, "value": critic}
        totals.count_update(window, [name for name in roles if roles[name] in learning])
        # The one transfer of an update: gradient norms, losses and KL together.
        measured = torch.stack([*losses.values(), approx_kl.double() / tokens])
        check = GradientCheck(*learning, measured=measured)
        *sums, mean_kl = check.measured
        self._check_losses(dict(zip(losses, sums, strict=True)))
        check.step()
        if not check.finite:
            logger.info(
                f"rollout {self.rollouts + 1}: gradients are not finite, so no engine stepped"
            )
            totals.skipped += 1
        elif self.ema is not None and actor in learning:
            self.ema.update()
        target = self.config.ppo.target_kl
        return target is not None and mean_kl > target

    def _windows(self, experience: Experience):
        """Yield the micro-batches of each update; the configuration ensures that sizes divide.

        --training_tokens_per_batch groups the rows of an update; which rows they are stays the
        same.
        """
        lengths = row_lengths(experience)
        device = experience.scores.device
        cut = align_experience if self.config.batch.training_tokens_per_batch else trim
        for _ in range(self.config.batch.ppo_epochs):
            order = torch.randperm(len(experience.scores), generator=self._order)
            updates = order.view(-1, self.config.rows_per_update).tolist()
            for window in self._micro_batches(updates, lengths, device):
                yield [
                    cut(
                        experience.rows(torch.tensor(rows).to(device, non_blocking=True)),
                        [lengths[row] for row in rows],
                    )
                    for rows in window
                ]

    def _micro_batches(
        self, updates: list[list[int]], lengths: list[tuple[int, int]], device: torch.device
    ) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each update.

        Args:
            updates: the rows of each update.
            lengths: of all rows of the rollout; see ``row_lengths``.
            device: for the exchange between ranks.
        """
        batch = self.config.batch
        if not batch.training_tokens_per_batch:
            size = batch.per_device_training_batch_size
            return [
                [rows[start : start + size] for start in range(0, len(rows), size)]
                for rows in updates
            ]
        groups = agreed_groups(
            [[sum(lengths[row]) for row in rows] for rows in updates],
            tokens=batch.training_tokens_per_batch,
            device=device,
        )
        return [
            [[rows[place] for place in group] for group in window]
            for rows, window in zip(updates, groups, strict=True)
        ]

    def _ptx_batches(self, *, is_last: bool) -> int:
        """Return how many PTX batches follow a micro-batch.

        An update has --gradient_accumulation_steps of them: one after each micro-batch, or with
        --training_tokens_per_batch, which changes the number of these, all after the last one.
        """
        if self.ptx is None:
            return 0
        if not self.config.batch.training_tokens_per_batch:
            return 1
        return self.config.schedule.gradient_accumulation_steps if is_last else 0

    def _ptx_loss(
        self, totals: UpdateTotals, losses: dict[str, torch.Tensor], undo: int
    ) -> torch.Tensor:
        """Return the weighted PTX loss of the next batch of text, ready for backward."""
        assert self.ptx is not None
        actor = self.engines.actor
        batch = next(self.ptx).to(actor.device)
        logits = forward_logits(
            actor, actor.module, input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )
        nll, tokens = (rows.sum() for rows in lm_loss_rows(logits, batch.labels))
        _add(losses, "PTX", nll)
        # A mean over this micro-batch of all ranks, and over the micro-batches of the update.
        share = undo / self.config.schedule.gradient_accumulation_steps / dist.all_reduce(tokens)
        totals.add({"ptx/loss": nll}, tokens)
        return self.config.data.unsup_coef * nll * share

    def _actor_loss(
        self, batch: Experience
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return the loss summed over tokens, sums to log, and the largest probability ratio."""
        with contextlib.nullcontext() if self._routers is None else self._routers.recording():
            logprobs, entropy = answer_logprobs(
                self.engines.actor, batch, temperature=self.config.sampling.temperature
            )
        ppo = self.config.ppo
        options = self.config.objective
        mask = batch.loss_mask
        weights = aggregation_weights(mask, options.loss_aggregation)
        importance = batch.importance if options.importance_correction != "none" else None
        loss, stats = policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            cliprange=ppo.cliprange,
            cliprange_high=options.cliprange_high,
            dual_clip=options.dual_clip,
            cispo=options.cispo,
            ratio_level=options.ratio_level,
            weights=product(weights, importance),
        )
        if ppo.entropy_coef:
            loss = loss - ppo.entropy_coef * masked_sum(product(entropy, weights), mask)
        sums = {
            "policy/clipfrac": stats["clipped"],
            "policy/approx_kl": stats["approx_kl"],
            "objective/entropy": masked_sum(entropy, mask),
        }
        if self._routers is not None:
            auxiliary, load = router_loss(self._routers, batch.attention_mask)
            loss = loss + self._routers.coef * auxiliary * self._policy_count(batch)
            sums["policy/router_aux_loss"] = auxiliary * mask.sum()
            sums["policy/expert_load"] = load * mask.sum()
        if options.kl_in == "loss":
            kl = kl_estimate(logprobs, batch.ref_logprobs, ppo.kl_estimator)
            loss = loss + self._rollout_kl_coef * masked_sum(product(kl, weights), mask)
            sums["policy/kl_loss"] = masked_sum(kl, mask)
        return loss, sums, stats["ratio_max"]

    def _policy_count(self, batch: Experience) -> torch.Tensor:
        """Return the number that divides the sum of a micro-batch's policy losses."""
        return aggregation_count(
            batch.loss_mask,
            self.config.objective.loss_aggregation,
            max_length=self.config.data.max_answer_seq_len,
        )

    def _critic_loss(self, batch: Experience) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, stats = value_loss(
            answer_values(self.engines.critic, batch),
            batch.values,
            batch.returns,
            batch.loss_mask,
            cliprange_value=self.config.ppo.cliprange_value,
        )
        return loss, {"value/loss": loss, "value/clipfrac": stats["clipped"]}

    def _check_rollout(self, metrics: dict[str, float]) -> None:
        number = self.rollouts + 1
        if metrics["response/length_max"] <= 1 and metrics["response/eos_rate"] == 1:
            raise ValueError(
                f"Rollout {number}: every answer is empty (its first token ends it). Give "
                "--min_answer_len, or check what --actor_model_name_or_path was trained to answer "
                "to such prompts."
            )
        if self.config.has_reference and not abs(metrics["objective/kl"]) < float("inf"):
            raise ValueError(
                f"Rollout {number}: the KL to the reference is {metrics['objective/kl']}. Lower "
                "--actor_learning_rate or raise --kl_coef; instead of --dtype fp16, take bf16 or "
                "fp32."
            )

    def _check_losses(self, sums: dict[str, float]) -> None:
        for name, total in sums.items():
            if not math.isfinite(total):
                raise ValueError(
                    f"Rollout {self.rollouts + 1}: the {name} loss, summed over ranks, is {total}. "
                    "The weights were not updated. Lower --actor_learning_rate or "
                    "--critic_learning_rate; instead of --dtype fp16, take bf16 or fp32."
                )


def _backward(engine, loss: torch.Tensor, *, is_last: bool) -> None:
    """Run the engine's backward; `is_last`: of the update.

    The engine cannot count an update's backwards, since their number varies.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss)


def _add(losses: dict[str, torch.Tensor], name: str, loss: torch.Tensor) -> None:
    """Add the loss of a micro-batch to the sum called `name`."""
    losses[name] = losses.get(name, 0.0) + loss.detach().double()


def product(values: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor | None:
    """Return the product of both, or the one that is there; None stands for 1 everywhere."""
    if values is None:
        return weights
    return values if weights is None else values * weights
