"""Direct preference optimisation (Rafailov et al. 2023): the objective and its reference policy."""

from dataclasses import replace

import torch

from dschat.algorithms.losses import dpo_loss, implicit_rewards
from dschat.algorithms.types import PairBatch
from dschat.engine.build import build_inference_engine
from dschat.engine.ds_config import inference_config
from dschat.engine.shared_models import AdaptersOff
from dschat.runtime import dist
from dschat.trainers.reference_model import reference_loader
from dschat.trainers.supervised import answer_nll, evaluate_rows
from dschat.trainers.supervised_run import SupervisedRun, load_start


def build_reference(run: SupervisedRun):
    """A frozen copy of the model that the step starts from, inside a separate engine; None where the trained model
    with its adapters off is the reference.
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
    load = reference_loader(config.system, config.lora, flag="--lora_module_name")
    return build_inference_engine(
        load_start(run, load, ds_config, dropout=0.0), ds_config=ds_config
    )


class DPOObjective:
    """-log sigmoid of the margin between the implicit rewards of a pair's answers; its terms are pairs."""

    name = "DPO"

    def __init__(self, reference, *, beta: float, label_smoothing: float):
        """
        Args:
            reference: an engine that never changes; None: the trained one with its adapters off.
        """
        self.reference, self.beta, self.label_smoothing = reference, beta, label_smoothing

    def weight(self, batch: PairBatch) -> torch.Tensor:
        return torch.tensor(batch.input_ids.shape[0] // 2, device=batch.input_ids.device)

    def loss_sum(self, engine, batch: PairBatch):
        logprobs, ref_logprobs = self._logprobs(engine, batch)
        chosen, rejected = implicit_rewards(logprobs, ref_logprobs, beta=self.beta).chunk(2)
        loss = dpo_loss(chosen, rejected, label_smoothing=self.label_smoothing)
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
        """Means over the pairs: ``eval/loss``, ``eval/accuracy`` (a tie is an error), ``eval/margin``, and of the chosen
        and the rejected answers ``_reward`` and ``_logprob``.
        """

        def rows_of(batch: PairBatch) -> torch.Tensor:  # [B, 4]
            return torch.stack(
                [half for values in self._logprobs(engine, batch) for half in values.chunk(2)], -1
            )

        rows = evaluate_rows(engine, loader, num_rows, rows_of)
        chosen_logprobs, rejected_logprobs, *ref_logprobs = rows.unbind(-1)
        chosen = implicit_rewards(chosen_logprobs, ref_logprobs[0], beta=self.beta)
        rejected = implicit_rewards(rejected_logprobs, ref_logprobs[1], beta=self.beta)
        columns = {
            "eval/loss": dpo_loss(chosen, rejected, label_smoothing=self.label_smoothing),
            "eval/accuracy": chosen > rejected,
            "eval/margin": chosen - rejected,
            "eval/chosen_reward": chosen,
            "eval/rejected_reward": rejected,
            "eval/chosen_logprob": chosen_logprobs,
            "eval/rejected_logprob": rejected_logprobs,
        }
        return {key: value.double().mean().item() for key, value in columns.items()}

    def _logprobs(self, engine, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[2B] under the policy and under the reference: each answer's tokens, the end token included, summed."""
        # The reference first: the logits of both together would be the step's memory peak.
        reference, training = self.reference, engine.module.training
        if reference is None:
            reference = AdaptersOff(engine)
        # What is shared with the policy must not drop out either.
        reference.eval()
        with torch.no_grad():
            ref_nll, _ = answer_nll(reference, batch)
        engine.train(training)
        nll, _ = answer_nll(engine, batch)
        return -nll, -ref_nll
