"""Metrics to debug PPO with: statistics of a rollout and of the updates on it, over all processes."""

import torch

from dschat.algorithms.losses import explained_variance, value_moments
from dschat.algorithms.masks import masked_sum, mean_and_std, moments
from dschat.algorithms.types import Experience
from dschat.runtime import dist


def rollout_metrics(
    experience: Experience,
    ended: torch.Tensor,
    *,
    score_std: float,
    reward_clip: float,
    has_critic: bool,
) -> dict[str, float]:
    """Statistics of one rollout, before advantages are whitened.

    Args:
        ended: [B] bool, True where the answer ended by itself.
        score_std: what scores were divided by before the clip.
    """
    mask = experience.response_mask
    lengths = mask.sum(-1).double()
    per_row = {
        "objective/score_clipped_frac": ((experience.scores / score_std).abs() > reward_clip)
        .double()
        .sum(),
        "objective/kl": masked_sum(experience.logprobs - experience.ref_logprobs, mask).double(),
        "objective/reward": masked_sum(experience.rewards, mask).double(),
        "response/length_mean": lengths.sum(),
        "response/eos_rate": ended.double().sum(),
    }
    blocks = [
        moments(experience.scores, torch.ones_like(ended)),
        torch.stack(list(per_row.values())),
        moments(experience.advantages, mask),
        masked_sum(experience.values, mask).double()[None],
        value_moments(experience.values, experience.returns, mask),
    ]
    reduced = dist.all_reduce(torch.cat(blocks)).split([len(block) for block in blocks])
    scores, rows, advantages, value_sum, value_sums = reduced
    score_mean, spread = mean_and_std(scores)
    advantage_mean, advantage_std = mean_and_std(advantages)
    metrics = {
        "objective/score": score_mean.item(),
        "objective/score_std": spread.item(),
        **dict(zip(per_row, (rows / scores[0]).tolist())),
        "response/length_max": dist.all_reduce(lengths.max(), "max").item(),
        "advantage/mean": advantage_mean.item(),
        "advantage/std": advantage_std.item(),
    }
    if has_critic:
        metrics["value/mean"] = (value_sum / advantages[0]).item()
        metrics["value/explained_variance"] = explained_variance(value_sums)
    return metrics


def rollout_flops(
    *, generated: list, scored: list, trained: list[tuple[torch.nn.Module, float]]
) -> float:
    """Floating-point operations that a rollout and its updates take for each token of its texts.

    By the usual count (Kaplan et al. 2020, table 1, without attention): 2 a parameter in a forward, 2 more for the
    gradient of its input and 2 for its own where it is trained. Recomputed activations and PTX texts do not count.

    Args:
        generated, scored: the models of each phase; one may be in several.
        trained: models with the passes over the rollout that their updates made.
    """
    forward = 2.0 * sum(_parameters(model) for model in (*generated, *scored))
    passes = (
        (4.0 * _parameters(model) + 2.0 * _parameters(model, trained=True), count)
        for model, count in trained
    )
    return forward + sum(flops * count for flops, count in passes)


def _parameters(model: torch.nn.Module, *, trained: bool = False) -> int:
    """Parameters of a model, whole under ZeRO-3; with `trained` those with a gradient."""
    found = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(getattr(p, "ds_numel", p.numel()) for p in found)


def logprob_gap(
    batches: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
) -> dict[str, float]:
    """Return the mean absolute difference of the generator's logprobs of the sampled tokens from the training engine's.

    Args:
        batches: the engine's logprobs, the generator's or None, and the response mask, all [B, R].
    """
    if any(sampled is None for _, sampled, _ in batches):
        return {}
    sums = [
        torch.stack([masked_sum((a - b).abs(), mask).double(), mask.sum().double()])
        for a, b, mask in batches
    ]
    gap, tokens = dist.all_reduce(torch.stack(sums).sum(0)).tolist()
    return {"rollout/logprob_gap": gap / tokens}


class UpdateTotals:
    """Sums over the micro-batches of a rollout's updates, reduced over processes once."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        self._micro_batches: dict[str, int] = {}
        self._ratio_max: torch.Tensor | None = None
        self.skipped = 0

    def add(
        self,
        sums: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        ratio_max: torch.Tensor | None = None,
    ) -> None:
        """Take in the sums of a micro-batch of `tokens` answer tokens."""
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0) + value.detach().double()
            self._tokens[key] = self._tokens.get(key, 0) + tokens.double()
            self._micro_batches[key] = self._micro_batches.get(key, 0) + 1
        if ratio_max is not None:
            before = ratio_max if self._ratio_max is None else self._ratio_max
            self._ratio_max = torch.maximum(before, ratio_max)

    def means(self) -> dict[str, float]:
        """Per-token means over all processes, and the micro-batches of a rank in each model's loss."""
        reduced = dist.all_reduce(torch.stack([*self._sums.values(), *self._tokens.values()]))
        sums, tokens = reduced.chunk(2)
        means = dict(zip(self._sums, (sums / tokens).tolist()))
        if self._ratio_max is not None:
            means["policy/ratio_max"] = dist.all_reduce(self._ratio_max, "max").item()
        for name in ("policy", "value"):
            if f"{name}/loss" in means:
                means[f"{name}/micro_batches"] = float(self._micro_batches[f"{name}/loss"])
        means["policy/skipped_steps"] = float(self.skipped)
        return means
