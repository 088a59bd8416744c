"""One loop for every stage that learns from fixed texts, given an objective.

An objective says what a batch weighs, what it loses and how it is evaluated; see ``SFTObjective``,
``RewardObjective`` and, in dpo.py, ``DPOObjective``. The loop divides each loss sum by the weight of the whole
optimizer step over all processes, so that the split into processes and micro-batches does not change the gradient.
"""

import math
import time
from typing import Protocol

import torch

from dschat.algorithms.losses import lm_loss_rows, pairwise_loss
from dschat.algorithms.masks import pool_last
from dschat.algorithms.types import PairBatch, TextBatch
from dschat.checkpoint.run_state import RunState
from dschat.engine.optim import GradientCheck, gradient_norm
from dschat.models.forward import forward_logits
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.tracking.metrics import MetricsWriter
from dschat.tracking.progress import Progress, memory_gib


class Objective(Protocol):
    """The objective of a supervised step."""

    name: str

    def weight(self, batch) -> torch.Tensor:
        """Scalar int64: the terms that the batch's loss sum runs over."""

    def loss_sum(self, engine, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss sum (scalar), and further sums, by their metrics' names, to be averaged over the weight and logged."""

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """Held-out metrics over the first `num_rows` rows of the loader's order."""


class SFTObjective:
    """Cross-entropy of the answers' tokens."""

    name = "SFT"

    def weight(self, batch: TextBatch) -> torch.Tensor:
        return (batch.labels[:, 1:] != -100).sum()

    def loss_sum(self, engine, batch: TextBatch):
        nll, _ = self._rows(engine, batch)
        return nll.sum(), {}

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """``eval/loss`` (nats a token) and ``eval/perplexity``, exact over all rows whatever the processes."""
        rows = evaluate_rows(
            engine, loader, num_rows, lambda batch: torch.stack(self._rows(engine, batch), -1)
        )
        nll, tokens = rows.sum(0).tolist()
        loss = nll / max(tokens, 1.0)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    def _rows(self, engine, batch: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
        nll, tokens = answer_nll(engine, batch)
        return nll, tokens.to(nll.dtype)


class RewardObjective:
    """Bradley-Terry on the scores of the last tokens."""

    name = "reward"

    def weight(self, batch: PairBatch) -> torch.Tensor:
        return torch.tensor(batch.input_ids.shape[0] // 2, device=batch.input_ids.device)

    def loss_sum(self, engine, batch: PairBatch):
        chosen, rejected = self._scores(engine, batch)
        margins = batch.margins.chunk(2)[0]
        return pairwise_loss(chosen, rejected, margins=margins).sum(), {
            "train/accuracy": (chosen > rejected).sum().detach()
        }

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """``eval/accuracy`` (a tie is an error), ``eval/loss``, and the scores' means and margin."""
        rows = evaluate_rows(
            engine, loader, num_rows, lambda batch: torch.stack(self._scores(engine, batch), -1)
        )
        chosen, rejected = rows.unbind(-1)
        return {
            "eval/accuracy": (chosen > rejected).double().mean().item(),
            "eval/loss": pairwise_loss(chosen, rejected).mean().item(),
            "eval/chosen_score": chosen.mean().item(),
            "eval/rejected_score": rejected.mean().item(),
            "eval/margin": (chosen - rejected).mean().item(),
        }

    def _scores(self, engine, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        # Pairs are padded on the right, so attention needs no mask.
        values = engine(input_ids=batch.input_ids, attention_mask=None)
        return pool_last(values, batch.attention_mask).chunk(2)


def train_supervised(
    engine,
    objective: Objective,
    run: RunState,
    *,
    eval_loader,
    num_eval_rows: int,
    total_steps: int,
    metrics: MetricsWriter,
    eval_interval: int = 0,
    log_interval_s: float = 5.0,
    print_loss: bool = False,
) -> None:
    """Train `engine` for `total_steps` optimizer steps, evaluating before, between and after.

    Args:
        run: gives the batches, and after each update may save the run or stop it.
        eval_loader: in the data set's order.
        num_eval_rows: how many of its rows are the data set's own; what wraps around after them is not counted.
        eval_interval: optimizer steps between evaluations; 0: after every epoch.

    Raises:
        ValueError: the loss is not finite (the step is not taken).
    """
    if run.step == 0:
        evaluated = objective.evaluate(engine, eval_loader, num_eval_rows)
        _report_evaluation(objective, "before training", evaluated)
        metrics.write(0, evaluated)
    progress = Progress(objective.name, total_steps, interval_s=log_interval_s, done=run.step)
    evaluate_every = eval_interval or run.steps_per_epoch
    windows = run.windows()
    with run:
        while run.step < total_steps:
            window, step, epoch = next(windows), run.step + 1, run.step // run.steps_per_epoch + 1
            values = run_update(engine, objective, window, step)
            if step == total_steps or step % evaluate_every == 0:
                values |= objective.evaluate(engine, eval_loader, num_eval_rows)
                _report_evaluation(objective, f"step {step}", values)
            metrics.write(step, values)
            if print_loss:
                logger.info(f"epoch {epoch}, step {step}, loss {values['train/loss']:.6f}")
            progress.update(step, _shown(values))
            run.end_step(last=step == total_steps)


def run_update(engine, objective: Objective, window: list, step: int) -> dict[str, float]:
    """Run one update and return its metrics.

    Args:
        engine: the DeepSpeed engine.
        objective: the loss.
        window: the micro-batches of this rank.
        step: number of the update, for messages.

    Raises:
        ValueError: the loss is not finite; the weights are as before.
    """
    started = time.monotonic()
    engine.train()
    rate = engine.get_lr()[0]  # of this update: engine.step() advances the schedule
    window = [batch.to(engine.device) for batch in window]
    own_weight = torch.stack([objective.weight(batch) for batch in window]).sum()
    weight = dist.all_reduce(own_weight)
    # DeepSpeed averages gradients over ranks and divides by the accumulation steps; undo both.
    scale = dist.world_size() * len(window) / weight.clamp(min=1)
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(window, 1):
        loss, extra = objective.loss_sum(engine, batch)
        for key, value in {"train/loss": loss.detach(), **extra}.items():
            sums[key] = sums.get(key, 0) + value
        engine.backward(loss * scale)
        if number < len(window):
            engine.step()
    tokens = torch.stack([batch.attention_mask.sum() for batch in window]).sum()
    measured = torch.stack([value.double() for value in (*sums.values(), own_weight, tokens)])
    check = GradientCheck(engine, measured=measured)
    *totals, all_weight, all_tokens = check.measured
    if not math.isfinite(totals[0]):
        raise ValueError(
            f"The loss of update {step}, summed over ranks, is {totals[0]}. Lower --learning_rate, "
            "or take --dtype bf16 or fp32 instead of fp16."
        )
    check.step()
    seconds = time.monotonic() - started
    return {
        **{key: total / all_weight for key, total in zip(sums, totals, strict=True)},
        "train/lr": rate,
        "train/grad_norm": gradient_norm(engine),
        "time/step_s": seconds,
        "perf/tokens_per_s": all_tokens / seconds,
        "perf/mem_gib": memory_gib()[0],
    }


def answer_nll(engine, batch: TextBatch | PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of each row's labels [B], fp32, and their number [B]; see ``lm_loss_rows``."""
    logits = forward_logits(engine, engine.module, input_ids=batch.input_ids, attention_mask=None)
    return lm_loss_rows(logits, batch.labels)


def evaluate_rows(engine, loader, num_rows: int, rows_of) -> torch.Tensor:
    """[num_rows, C] float64: `rows_of(batch)` [B, C] of all processes' batches, in the data set's order."""
    engine.eval()
    with torch.no_grad():
        local = torch.cat([rows_of(batch.to(engine.device)).double() for batch in loader])
    return dist.gather_rows(local, num_rows)


def _shown(values: dict[str, float]) -> dict[str, str]:
    shown = {"loss": f"{values['train/loss']:.3f}"}
    for key in ("train/accuracy", "rewards/accuracy"):
        if key in values:
            shown["acc"] = f"{100 * values[key]:.0f}%"
    return {
        **shown,
        "lr": f"{values['train/lr']:.1e}",
        "tok/s": f"{values['perf/tokens_per_s']:,.0f}",
    }


def _report_evaluation(objective: Objective, when: str, values: dict[str, float]) -> None:
    shown = "  ".join(
        f"{key[5:]} {value:.4g}" for key, value in values.items() if key.startswith("eval/")
    )
    logger.info(f"{objective.name}  evaluation, {when}: {shown}")
