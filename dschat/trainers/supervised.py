"""The training loop of steps 1, 2 and DPO, and the objectives of SFT and reward modelling.

An objective gives the loss of a batch, its number of terms and an evaluation; see ``SFTObjective``,
``RewardObjective`` and, in dpo.py, ``DPOObjective``. The loop divides each loss sum by the number
of terms of the whole update over all ranks. So the split into ranks and micro-batches does not
change the gradient.
"""

import math
import time
from pathlib import Path
from typing import Protocol

import torch

from dschat.algorithms.losses import centering_loss, lm_loss_tokens, pairwise_loss
from dschat.algorithms.masks import pool_last
from dschat.algorithms.types import PackedBatch, PackedPairBatch, PairBatch, TextBatch
from dschat.checkpoint.run_state import RunState
from dschat.engine.optim import GradientCheck, gradient_norm
from dschat.models.forward import forward_logits
from dschat.models.routers import RouterWatch
from dschat.runtime import dist
from dschat.runtime.files import write_json
from dschat.runtime.log import logger
from dschat.tracking.metrics import MetricsWriter
from dschat.tracking.progress import Progress, ReportedBatches, memory_gib
from dschat.trainers.micro_batches import split_by_length
from dschat.trainers.router_loss import router_loss


class Objective(Protocol):
    """The objective of a supervised step."""

    name: str
    margins: torch.Tensor | None  # [num_rows] of the last evaluation on pairs, else None

    def weight(self, batch) -> torch.Tensor:
        """Return the number of terms in the batch's loss sum, a scalar int64."""

    def loss_sum(self, engine, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss summed over terms (a scalar), and further sums to log, by metric name.

        All are averaged over the terms of the update for logging.
        """

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """Return metrics over the first `num_rows` rows, in the order of the loader."""


class SFTObjective:
    """Cross-entropy over the tokens of answers."""

    name = "SFT"
    margins: torch.Tensor | None = None

    def weight(self, batch: TextBatch) -> torch.Tensor:
        """Return the number of tokens with a label."""
        return (batch.labels[:, 1:] != -100).sum()

    def loss_sum(self, engine, batch: TextBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the cross-entropy summed over tokens; nothing else is logged."""
        nll, _ = self._rows(engine, batch)
        return nll.sum(), {}

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """Return ``eval/loss`` (nats per token) and ``eval/perplexity``.

        They do not depend on the number of ranks.
        """
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
    """The Bradley-Terry loss on scores read at the last token."""

    name = "reward"
    margins: torch.Tensor | None = None

    def __init__(self, *, center_rewards_coef: float = 0.0):
        """Set the weight of ``centering_loss`` in training; evaluation leaves it out."""
        self.center_rewards_coef = center_rewards_coef

    def weight(self, batch: PairBatch | PackedPairBatch) -> torch.Tensor:
        """Return the number of pairs."""
        return count_pairs(batch)

    def loss_sum(
        self, engine, batch: PairBatch | PackedPairBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss summed over pairs, and the number of pairs in the right order."""
        chosen, rejected = self._scores(engine, batch)
        margins = batch.margins.chunk(2)[0]
        loss = pairwise_loss(chosen, rejected, margins=margins).sum()
        if self.center_rewards_coef:
            loss = loss + self.center_rewards_coef * centering_loss(chosen, rejected).sum()
        return loss, {"train/accuracy": (chosen > rejected).sum().detach()}

    def evaluate(self, engine, loader, num_rows: int) -> dict[str, float]:
        """Return ``eval/accuracy`` (a tie counts as wrong), ``eval/loss`` and the mean scores."""
        rows = evaluate_rows(
            engine, loader, num_rows, lambda batch: torch.stack(self._scores(engine, batch), -1)
        )
        chosen, rejected = rows.unbind(-1)
        self.margins = chosen - rejected
        return {
            "eval/accuracy": (chosen > rejected).double().mean().item(),
            "eval/loss": pairwise_loss(chosen, rejected).mean().item(),
            "eval/chosen_score": chosen.mean().item(),
            "eval/rejected_score": rejected.mean().item(),
            "eval/margin": (chosen - rejected).mean().item(),
        }

    def _scores(
        self, engine, batch: PairBatch | PackedPairBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(batch, PackedPairBatch):
            values = engine(
                input_ids=batch.input_ids, attention_mask=None, position_ids=batch.position_ids
            )
            return pool_last(batch.by_text(values), batch.text_mask).chunk(2)
        # Pairs are padded on the right, so causal attention needs no mask.
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
    tokens_per_batch: int = 0,
    routers: RouterWatch | None = None,
) -> None:
    """Train `engine` for `total_steps` updates; evaluate before, between and after them.

    Args:
        engine: the DeepSpeed engine.
        objective: the loss and the evaluation.
        run: gives the batches, and after each update may save the run or stop it; its callbacks
            are called.
        eval_loader: in the data set's order.
        num_eval_rows: rows of the evaluation set; rows after them wrap around and are not counted.
        total_steps: updates of the whole run.
        metrics: gets the metrics of each update.
        eval_interval: updates between evaluations; 0: evaluate after every epoch.
        log_interval_s: seconds between progress lines.
        print_loss: log the loss of every update.
        tokens_per_batch, routers: see ``run_update``.

    Raises:
        ValueError: the loss is not finite; the weights are as before.
        Stopped: a signal was received; the state has been saved if possible.
    """
    eval_loader = ReportedBatches(
        eval_loader, f"{objective.name}  evaluation", interval_s=log_interval_s
    )
    if run.step == 0:
        evaluated = objective.evaluate(engine, eval_loader, num_eval_rows)
        _save_margins(objective, run)
        _report_evaluation(objective, "before training", evaluated)
        metrics.write(0, evaluated)
        run.callbacks.on_evaluate(0, evaluated)
    progress = Progress(objective.name, total_steps, interval_s=log_interval_s, done=run.step)
    evaluate_every = eval_interval or run.steps_per_epoch
    windows = run.windows()
    with run:
        while run.step < total_steps:
            window = next(windows)
            epoch = run.step // run.steps_per_epoch + 1
            step = run.step + 1
            values = run_update(
                engine,
                objective,
                window,
                step,
                tokens_per_batch=tokens_per_batch,
                routers=routers,
            )
            if step == total_steps or step % evaluate_every == 0:
                values |= objective.evaluate(engine, eval_loader, num_eval_rows)
                _save_margins(objective, run, step=step)
                _report_evaluation(objective, f"update {step}", values)
            metrics.write(step, values)
            if print_loss:
                logger.info(f"epoch {epoch}, update {step}, loss {values['train/loss']:.6f}")
            progress.update(step, _progress_fields(values))
            run.callbacks.on_update(step, values)
            run.callbacks.on_evaluate(step, values)
            run.end_step(last=step == total_steps)


def run_update(
    engine,
    objective: Objective,
    window: list,
    step: int,
    *,
    tokens_per_batch: int = 0,
    routers: RouterWatch | None = None,
) -> dict[str, float]:
    """Run one update and return its metrics.

    Args:
        engine: the DeepSpeed engine.
        objective: the loss.
        window: the micro-batches of this rank.
        step: number of the update, for messages.
        tokens_per_batch: divide the rows of each batch again into micro-batches of like length with
            at most this many tokens; 0: take the micro-batches as they are.
        routers: whose auxiliary loss is added; None: none is.

    Raises:
        ValueError: the loss is not finite; the weights are as before.
    """
    started = time.monotonic()
    engine.train()
    rate = engine.get_lr()[0]  # of this update: engine.step() advances the schedule
    if tokens_per_batch:
        window = [
            micro
            for batch in window
            for micro in split_by_length(batch, tokens=tokens_per_batch, device=engine.device)
        ]
    window = [batch.to(engine.device) for batch in window]
    own_weight = torch.stack([objective.weight(batch) for batch in window]).sum()
    weight = dist.all_reduce(own_weight)
    # DeepSpeed averages gradients over ranks and divides by the accumulation steps; undo both.
    scale = dist.world_size() * engine.gradient_accumulation_steps() / weight.clamp(min=1)
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(window, 1):
        if tokens_per_batch:
            # Their number varies, so the engine cannot count them.
            engine.set_gradient_accumulation_boundary(number == len(window))
        loss, extra = _loss_sum(engine, objective, batch, routers)
        for key, value in {"train/loss": loss.detach(), **extra}.items():
            sums[key] = sums.get(key, 0) + value
        engine.backward(loss * scale)
        if number < len(window):
            engine.step()
    tokens = torch.stack([batch.attention_mask.sum() for batch in window]).sum()
    computed = torch.full_like(tokens, sum(batch.input_ids.numel() for batch in window))
    measured = [value.double() for value in (*sums.values(), own_weight, tokens, computed)]
    check = GradientCheck(engine, measured=torch.stack(measured))
    *totals, all_weight, all_tokens, all_computed = check.measured
    if not math.isfinite(totals[0]):
        raise ValueError(
            f"The loss of update {step}, summed over ranks, is {totals[0]}. Lower --learning_rate; "
            "instead of --dtype fp16, take bf16 or fp32."
        )
    check.step()
    seconds = time.monotonic() - started
    return {
        **{key: total / all_weight for key, total in zip(sums, totals, strict=True)},
        "train/real_tokens": all_tokens / all_computed,
        "train/lr": rate,
        "train/grad_norm": gradient_norm(engine),
        "time/step_s": seconds,
        "perf/tokens_per_s": all_tokens / seconds,
        "perf/mem_gib": memory_gib()[0],
    }


def count_pairs(batch: PairBatch | PackedPairBatch) -> torch.Tensor:
    """Return the number of pairs as an int64 scalar, without a transfer to the GPU."""
    return torch.full((), len(batch.margins) // 2, device=batch.margins.device)


def _loss_sum(
    engine, objective: Objective, batch, routers: RouterWatch | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the objective's sums, with the auxiliary loss of the routers.

    That counts a micro-batch by its terms. It is not a sum over tokens, so that it depends on the
    division of an update into micro-batches.
    """
    if routers is None:
        return objective.loss_sum(engine, batch)
    with routers.recording():
        loss, sums = objective.loss_sum(engine, batch)
    auxiliary, load = router_loss(routers, batch.attention_mask)
    weight = objective.weight(batch)
    sums = {
        **sums,
        "train/router_aux_loss": auxiliary.detach() * weight,
        "train/expert_load": load * weight,
    }
    return loss + routers.coef * auxiliary * weight, sums


def answer_nll(
    engine, batch: TextBatch | PairBatch | PackedPairBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of the labels of each row, and their number.

    Returns:
        [B] fp32 and [B] int64; [2N] of the texts of packed pairs.
    """
    logits = forward_logits(
        engine,
        engine.module,
        input_ids=batch.input_ids,
        attention_mask=None,
        position_ids=batch.position_ids if isinstance(batch, PackedBatch) else None,
    )
    nll, mask = lm_loss_tokens(logits, batch.labels)
    if isinstance(batch, PackedPairBatch):
        nll = batch.by_text(nll) * batch.text_mask
        mask = batch.by_text(mask) * batch.text_mask
    return nll.sum(-1), mask.sum(-1)


def evaluate_rows(engine, loader, num_rows: int, columns_of) -> torch.Tensor:
    """Evaluate a function of batches on all ranks.

    Args:
        engine: switched to evaluation.
        loader: batches of this rank.
        num_rows: rows of the data set.
        columns_of: returns C numbers for each row of a batch, [B, C].

    Returns:
        [num_rows, C] float64, in the order of the data set, on every rank.
    """
    engine.eval()
    with torch.no_grad():
        local = torch.cat([columns_of(batch.to(engine.device)).double() for batch in loader])
    return dist.gather_rows(local, num_rows)


def _save_margins(objective: Objective, run: RunState, *, step: int = 0) -> None:
    """Write the margins of the last evaluation to evaluation/margins_N.json, for the report.

    Before training, those of an earlier run in the folder are deleted.
    """
    output_dir = run.config.run.output_dir
    if output_dir is None or objective.margins is None or not dist.is_main():
        return
    folder = Path(output_dir) / "evaluation"
    if step == 0:
        for file in folder.glob("margins_*.json"):
            file.unlink()
    margins = [round(value, 6) for value in objective.margins.tolist()]
    write_json(folder / f"margins_{step:06d}.json", {"margins": margins})


def _progress_fields(values: dict[str, float]) -> dict[str, str]:
    """Return the fields of the progress line."""
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
