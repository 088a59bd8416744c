"""PPO on the four engines: generate experience, then learn from it.

    PromptBatch -> generate -> Answers -> make_experience -> Experience -> ppo_epochs x minibatches of
    policy_loss and value_loss.
"""

import itertools
import time

import torch

from dschat.algorithms.kl import KLController
from dschat.algorithms.logprobs import token_logprobs
from dschat.algorithms.losses import policy_loss, value_loss
from dschat.algorithms.masks import masked_sum
from dschat.algorithms.types import Experience, PromptBatch
from dschat.config.steps import PPOConfig
from dschat.engine.optim import step_together
from dschat.tracking import dist
from dschat.tracking.log import logger
from dschat.tracking.metrics import MetricsWriter
from dschat.tracking.progress import Progress, memory_gib
from dschat.trainers.ppo_stats import UpdateTotals, rollout_metrics
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine
from dschat.trainers.rollout import (
    Answers,
    answer_logits,
    answer_values,
    concatenate,
    generate,
    make_experience,
    print_answers,
    sampling_config,
    trim,
    whiten,
)


class DeepSpeedPPOTrainer:
    """Proximal policy optimisation of the actor against the reward model, with a critic and a KL penalty."""

    def __init__(
        self,
        engines: DeepSpeedRLHFEngine,
        config: PPOConfig,
        *,
        eos_token_ids: tuple[int, ...],
        pad_token_id: int,
        score_std: float = 1.0,
    ):
        """
        Args:
            eos_token_ids: the ids that end an answer.
            score_std: scores are divided by it; one constant for the whole run.
        """
        self.engines, self.config, self.score_std = engines, config, score_std
        self.pad_token_id = pad_token_id
        self.generation = sampling_config(
            max_new_tokens=config.data.max_answer_seq_len,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            sampling=config.sampling,
        )
        self.kl = KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon)
        self.rollouts = 0
        self._order = torch.Generator().manual_seed(config.run.seed + 7919 * dist.rank())

    def generate_experience(self, batches: list[PromptBatch]) -> tuple[Experience, list[Answers], dict[str, float]]:
        """One rollout: answers to all prompt batches, scored, with whitened advantages.

        Returns:
            The Experience of all rows of this process, the answers batch by batch, and metrics over all processes.
        """
        started = time.monotonic()
        answers = [
            generate(self.engines.actor, prompts.to(self.engines.actor.device), generation=self.generation)
            for prompts in batches
        ]
        generated = time.monotonic()
        pieces = [
            make_experience(
                self.engines,
                batch,
                ppo=self.config.ppo,
                temperature=self.config.sampling.temperature,
                score_std=self.score_std,
                kl_coef=self.kl.coef,
            )
            for batch in answers
        ]
        experience = concatenate(pieces, pad_token_id=self.pad_token_id)
        ended = torch.cat([batch.ended for batch in answers])
        metrics = rollout_metrics(
            experience, ended, score_std=self.score_std, reward_clip=self.config.ppo.reward_clip
        )
        metrics["kl_coef"] = self.kl.coef
        self.kl.update(metrics["objective/kl"], len(ended) * dist.world_size())
        if self.config.ppo.whiten_advantages:
            experience = whiten(experience)
        metrics["time/generate_s"] = generated - started
        metrics["time/score_s"] = time.monotonic() - generated
        return experience, answers, metrics

    def train_rlhf(self, experience: Experience) -> dict[str, float]:
        """`ppo_epochs` passes over the rollout in shuffled minibatches; returns metrics over all processes."""
        started = time.monotonic()
        self.engines.train()
        totals = UpdateTotals()
        stopped = False
        for _ in range(self.config.batch.ppo_epochs):
            for window in self._windows(experience):
                stopped = self._optimizer_step(window, totals)
                if stopped:
                    break
            if stopped:
                break
        self.rollouts += 1
        return {
            **totals.means(),
            "grad_norm/actor": float(self.engines.actor.get_global_grad_norm() or 0.0),
            "grad_norm/critic": float(self.engines.critic.get_global_grad_norm() or 0.0),
            "lr/actor": self.engines.actor.get_lr()[0],
            "lr/critic": self.engines.critic.get_lr()[0],
            "time/train_s": time.monotonic() - started,
            "perf/mem_gib": memory_gib()[0],
        }

    def _windows(self, experience: Experience):
        """The micro-batches of each optimizer step of one epoch; sizes divide, which the configuration has checked."""
        rows = self.config.batch.per_device_training_batch_size
        steps = self.config.schedule.gradient_accumulation_steps
        order = torch.randperm(len(experience.scores), generator=self._order).to(experience.scores.device)
        for index in order.view(-1, steps, rows):
            yield [trim(experience.rows(micro)) for micro in index]

    def _optimizer_step(self, window: list[Experience], totals: UpdateTotals) -> bool:
        """One optimizer step of critic and actor; True where --target_kl then ends the updates of this rollout."""
        tokens = dist.all_reduce(torch.stack([batch.response_mask.sum() for batch in window]).sum())
        # DeepSpeed averages gradients over processes and divides by the accumulation steps; undo both.
        scale = dist.world_size() * len(window) / tokens
        actor, critic = self.engines.actor, self.engines.critic
        learning = [critic] if self.rollouts < self.config.ppo.critic_warmup_steps else [actor, critic]
        approx_kl = torch.zeros((), device=tokens.device)
        for batch in window:
            if actor in learning:
                loss, sums, ratio_max = self._actor_loss(batch)
                actor.backward(loss * scale)
                totals.add(sums, batch.response_mask.sum(), ratio_max)
                approx_kl += sums["policy/approx_kl"]
            loss, sums = self._critic_loss(batch)
            critic.backward(loss * scale)
            totals.add(sums, batch.response_mask.sum())
            if not step_together(*learning):
                logger.info(f"rollout {self.rollouts + 1}: gradients are not finite, so no engine stepped")
                totals.skipped += 1
        target = self.config.ppo.target_kl
        return target is not None and (dist.all_reduce(approx_kl) / tokens).item() > target

    def _actor_loss(self, batch: Experience) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss sum, sums to log, and the largest ratio."""
        num_tokens = batch.response_mask.shape[1]
        logits = answer_logits(self.engines.actor, batch.input_ids, batch.attention_mask, num_tokens)
        tokens = batch.input_ids[:, -num_tokens:]
        logprobs, entropy = token_logprobs(logits, tokens, temperature=self.config.sampling.temperature)
        loss, stats = policy_loss(
            logprobs, batch.logprobs, batch.advantages, batch.response_mask, cliprange=self.config.ppo.cliprange
        )
        entropy_sum = masked_sum(entropy, batch.response_mask)
        if self.config.ppo.entropy_coef:
            loss = loss - self.config.ppo.entropy_coef * entropy_sum
        sums = {
            "policy/loss": loss,
            "policy/clipfrac": stats["clipped"],
            "policy/approx_kl": stats["approx_kl"],
            "objective/entropy": entropy_sum,
        }
        return loss, sums, stats["ratio_max"]

    def _critic_loss(self, batch: Experience) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        num_tokens = batch.response_mask.shape[1]
        values = answer_values(self.engines.critic, batch.input_ids, batch.attention_mask, num_tokens)
        loss, stats = value_loss(
            values,
            batch.values,
            batch.returns,
            batch.response_mask,
            cliprange_value=self.config.ppo.cliprange_value,
        )
        return loss, {"value/loss": loss, "value/clipfrac": stats["clipped"]}


def train_ppo(
    trainer: DeepSpeedPPOTrainer, loader, evaluator, *, rollouts: int, metrics: MetricsWriter, tokenizer
) -> None:
    """`rollouts` times: generate experience, learn from it, report.

    Args:
        loader: PromptBatches; its sampler has ``set_epoch``, and an epoch is a whole number of rollouts.
        evaluator: has ``evaluate(rollout) -> metrics``.
    """
    run = trainer.config.run
    progress = Progress("PPO", rollouts, interval_s=run.log_interval_s)
    for step, batches in zip(range(1, rollouts + 1), _rollout_batches(loader, trainer.config.batch.generation_batches)):
        experience, answers, values = trainer.generate_experience(batches)
        if run.print_answers and (step - 1) % run.print_answers_interval == 0:
            print_answers(answers, experience.scores, tokenizer)
        values |= trainer.train_rlhf(experience)
        values |= _speed(experience, values)
        if step == rollouts or (run.eval_interval and step % run.eval_interval == 0):
            values |= evaluator.evaluate(step)
        metrics.write(step, values, tensorboard=_pipeline_tags(values, trainer.config))
        progress.update(step, _shown(values))


def _rollout_batches(loader, generation_batches: int):
    """Lists of `generation_batches` prompt batches, epoch after epoch."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        while window := list(itertools.islice(batches, generation_batches)):
            yield window


def _speed(experience: Experience, values: dict[str, float]) -> dict[str, float]:
    tokens = dist.all_reduce(experience.attention_mask.sum()).item()
    seconds = values["time/generate_s"] + values["time/score_s"] + values["time/train_s"]
    return {"perf/tokens_per_s": tokens / seconds}


def _pipeline_tags(values: dict[str, float], config: PPOConfig) -> dict[str, float]:
    """DeepSpeed-Chat's TensorBoard tags: means, and sums over the micro-batches of a process."""
    micro_batches = config.updates_per_rollout * config.schedule.gradient_accumulation_steps
    actor, critic = values.get("policy/loss", 0.0), values["value/loss"]
    return {
        "reward": values["objective/score"],
        "actor_loss": actor,
        "actor_loss_sum": actor * micro_batches,
        "critic_loss": critic,
        "critic_loss_sum": critic * micro_batches,
    }


def _shown(values: dict[str, float]) -> dict[str, str]:
    return {
        "score": f"{values['objective/score']:.3f}",
        "KL": f"{values['objective/kl']:.2f}",
        "len": f"{values['response/length_mean']:.1f}",
        "ev": f"{values['value/explained_variance']:.2f}",
        "s gen/score/train": "/".join(f"{values[f'time/{phase}_s']:.1f}" for phase in ("generate", "score", "train")),
        "tok/s": f"{values['perf/tokens_per_s']:,.0f}",
    }
