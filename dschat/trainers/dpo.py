"""Direct preference optimisation (Rafailov et al. 2023): the objective and its reference policy."""

from dataclasses import replace

import torch

from dschat.algorithms.losses import (
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    robust_dpo_loss,
)
from dschat.algorithms.types import PackedPairBatch, PairBatch
from dschat.engine.build import build_inference_engine
from dschat.engine.ds_config import inference_config
from dschat.engine.shared_models import AdaptersOff
from dschat.models.causal_lm import load_causal_lm
from dschat.runtime import dist
from dschat.trainers.frozen_models import rounded
from dschat.trainers.supervised import answer_nll, count_pairs, evaluate_rows
from dschat.trainers.supervised_run import SupervisedRun, load_start


def build_reference(run: SupervisedRun):
    """Build a frozen copy of the initial model, inside a separate engine.

    Returns:
        The engine; None if the trained model with its adapters off is the reference.
    """
    config = run.config
    if config.shares_reference:
        return None
    system = replace(config.system, offload=config.system.offload_reference_model)
    ds_config = inference_config(
        system,
        dtype=run.dtype,
        micro_batch_size=config.batch.per_device_train_batch_size,
        world_size=dist.world_size(),
    )
    load = rounded(load_causal_lm, config.system.frozen_format, config.lora)
    return build_inference_engine(
        load_start(run, load, ds_config, dropout=0.0), ds_config=ds_config
    )


class DPOObjective:
    """The DPO loss: a function of the margin between the implicit rewards of a pair's answers.

    Losses are averaged over pairs.
    """

    name = "DPO"
    margins: torch.Tensor | None = None

    def __init__(
        self, reference, *, beta: float, label_smoothing: float, loss_type: str = "sigmoid"
    ):
        """Set the reference and the loss.

        Args:
            reference: an engine that never changes; None: the trained one with its adapters off.
            beta: factor of the log ratios in the implicit rewards.
            label_smoothing: assumed probability that a pair's preference is wrong; of the types
                sigmoid and robust.
            loss_type: sigmoid, ipo, hinge or robust.
        """
        self.reference = reference
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_type = loss_type

    def weight(self, batch: PairBatch | PackedPairBatch) -> torch.Tensor:
        """Return the number of pairs."""
        return count_pairs(batch)

    def loss_sum(
        self, engine, batch: PairBatch | PackedPairBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss summed over pairs, and sums of rewards and log-probabilities to log."""
        logprobs, ref_logprobs, lengths = self._logprobs(engine, batch)
        chosen, rejected = implicit_rewards(logprobs, ref_logprobs, beta=self.beta).chunk(2)
        loss = self._pair_losses(chosen, rejected, *lengths.chunk(2))
        chosen_logprobs, rejected_logprobs = logprobs.chunk(2)
        logged = {
            "rewards/accuracy": chosen > rejected,
            "rewards/margin": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "logprobs/chosen": chosen_logprobs,
            "logprobs/rejected": rejected_logprobs,
        }
        return loss.sum(), {key: value.detach().sum() for key, value in logged.items()}

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """Return means over held-out pairs.

        Returns:
            ``eval/loss``, ``eval/accuracy`` (a tie counts as wrong), ``eval/margin``, and for the
            chosen and the rejected answers ``_reward`` and ``_logprob``.
        """

        def columns_of(batch: PairBatch) -> torch.Tensor:  # [B, 6]
            logprobs, ref_logprobs, lengths = self._logprobs(engine, batch)
            columns = (logprobs, ref_logprobs, lengths.to(logprobs.dtype))
            return torch.stack([half for column in columns for half in column.chunk(2)], -1)

        rows = evaluate_rows(engine, loader, num_rows, columns_of)
        chosen_logprobs, rejected_logprobs, *others = rows.unbind(-1)
        chosen_ref, rejected_ref, *lengths = others
        chosen = implicit_rewards(chosen_logprobs, chosen_ref, beta=self.beta)
        rejected = implicit_rewards(rejected_logprobs, rejected_ref, beta=self.beta)
        self.margins = chosen - rejected
        columns = {
            "eval/loss": self._pair_losses(chosen, rejected, *lengths),
            "eval/accuracy": chosen > rejected,
            "eval/margin": chosen - rejected,
            "eval/chosen_reward": chosen,
            "eval/rejected_reward": rejected,
            "eval/chosen_logprob": chosen_logprobs,
            "eval/rejected_logprob": rejected_logprobs,
        }
        return {key: value.double().mean().item() for key, value in columns.items()}

    def _pair_losses(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        chosen_length: torch.Tensor,
        rejected_length: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of each pair from the rewards and lengths of its answers, all [B]."""
        if self.loss_type == "ipo":
            # Per token: a sum reaches the target sooner the longer the answer is.
            return ipo_loss(
                chosen / (self.beta * chosen_length),
                rejected / (self.beta * rejected_length),
                beta=self.beta,
            )
        if self.loss_type == "hinge":
            return hinge_loss(chosen, rejected)
        loss = robust_dpo_loss if self.loss_type == "robust" else dpo_loss
        return loss(chosen, rejected, label_smoothing=self.label_smoothing)

    def _logprobs(
        self, engine, batch: PairBatch | PackedPairBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the answers, summed over tokens with the end token.

        Returns:
            [2B] of the policy, [2B] of the reference, and [2B] int64, the number of tokens of each
            answer with its end token, at least 1.
        """
        training = engine.module.training
        reference = AdaptersOff(engine) if self.reference is None else self.reference
        # The reference goes first: the logits of both at once would be the memory peak.
        # Dropout is off, also if the weights are shared with the policy.
        reference.eval()
        with torch.no_grad():
            ref_nll, _ = answer_nll(reference, batch)
        engine.train(training)
        nll, lengths = answer_nll(engine, batch)
        return -nll, -ref_nll, lengths.clamp(min=1)
