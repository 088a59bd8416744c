"""Metrics of PPO: statistics of a rollout and of the updates on it, over all ranks."""

import torch

from dschat.algorithms.advantages import equal_groups
from dschat.algorithms.losses import explained_variance, value_moments
from dschat.algorithms.masks import masked_sum, mean_and_std, moments
from dschat.algorithms.repetition import repeated_share
from dschat.algorithms.types import Experience
from dschat.runtime import dist


def rollout_metrics(
    experience: Experience,
    ended: torch.Tensor,
    *,
    score_std: float,
    reward_clip: float,
    has_critic: bool,
    has_reference: bool = True,
) -> dict[str, float]:
    """Return statistics of one rollout. Advantages must not be whitened yet.

    Args:
        experience: of this rank.
        ended: [B] bool; True: the answer ended with an EOS.
        score_std: divisor of the scores before the clip.
        reward_clip: the clip.
        has_critic: whether to add statistics of the values.
        has_reference: whether to add the KL to the reference.
    """
    mask = experience.response_mask
    lengths = mask.sum(-1).double()
    clipped = (experience.scores / score_std).abs() > reward_clip
    answers = experience.input_ids[:, -mask.shape[1] :]
    per_row = {
        "objective/score_clipped_frac": clipped.double().sum(),
        "objective/kl": masked_sum(experience.logprobs - experience.ref_logprobs, mask).double(),
        "objective/reward": masked_sum(experience.rewards, mask).double(),
        "response/length_mean": lengths.sum(),
        "response/eos_rate": ended.double().sum(),
        "response/repetition": repeated_share(answers, mask).sum(),
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
    if not has_reference:
        del metrics["objective/kl"]
    if has_critic:
        metrics["value/mean"] = (value_sum / advantages[0]).item()
        metrics["value/explained_variance"] = explained_variance(value_sums)
    return metrics


def rollout_flops(
    *, generated: list, scored: list, trained: list[tuple[torch.nn.Module, float]]
) -> float:
    """Return the floating-point operations of a rollout and its updates, per token of its texts.

    The count is that of Kaplan et al. 2020, table 1, without attention. Each parameter takes 2
    operations in a forward pass, 2 for the gradient of the input and, if trained, 2 for its own
    gradient. Recomputed activations and PTX texts are not counted.

    Args:
        generated: models that generate.
        scored: models that score; a model may be in several lists.
        trained: models that are updated, with their number of passes over the rollout.
    """
    forward = 2.0 * sum(_parameters(model) for model in (*generated, *scored))
    passes = (
        (4.0 * _parameters(model) + 2.0 * _parameters(model, trained=True), count)
        for model, count in trained
    )
    return forward + sum(flops * count for flops, count in passes)


def _parameters(model: torch.nn.Module, *, trained: bool = False) -> int:
    """Count the parameters of a model, also under ZeRO-3; with `trained` only trainable ones."""
    found = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(getattr(p, "ds_numel", p.numel()) for p in found)


def logprob_gap(
    batches: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
) -> dict[str, float]:
    """Return the mean absolute difference between generator and training engine in log-probability.

    It is taken over sampled tokens, as "rollout/logprob_gap".

    Args:
        batches: log-probabilities of the engine and of the generator, and the response mask, all
            [B, R]. If a generator's are None, the result is empty.
    """
    if any(sampled is None for _, sampled, _ in batches):
        return {}
    sums = [
        torch.stack([masked_sum((a - b).abs(), mask).double(), mask.sum().double()])
        for a, b, mask in batches
    ]
    gap, tokens = dist.all_reduce(torch.stack(sums).sum(0)).tolist()
    return {"rollout/logprob_gap": gap / tokens}


def equal_groups_metric(scores: list[torch.Tensor], num_samples: int) -> dict[str, float]:
    """Return the share of groups whose answers all score the same, as "rollout/equal_groups".

    Args:
        scores: of each batch of this rank, [B].
        num_samples: answers in a group.
    """
    equal = equal_groups(torch.cat(scores), num_samples).double()
    total, count = dist.all_reduce(
        torch.stack([equal.sum(), torch.ones_like(equal).sum()])
    ).tolist()
    return {"rollout/equal_groups": total / count}


class UpdateTotals:
    """Sums over the micro-batches of a rollout's updates, reduced over ranks once.

    ``skipped`` counts updates that were skipped because of non-finite gradients.
    """

    def __init__(self):
        """Start from zero."""
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        self._micro_batches: dict[str, int] = {}
        self._updates: dict[str, int] = {}
        self._real: torch.Tensor | float = 0.0
        self._computed = 0
        self._ratio_max: torch.Tensor | None = None
        self.skipped = 0

    def count_update(self, window: list[Experience], names: list[str]) -> None:
        """Count an update of the models of these `names`, and the tokens of its micro-batches."""
        for name in names:
            self._updates[name] = self._updates.get(name, 0) + 1
        self._real += torch.stack([batch.attention_mask.sum() for batch in window]).sum().double()
        self._computed += sum(batch.input_ids.numel() for batch in window)

    def add(
        self,
        sums: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        ratio_max: torch.Tensor | None = None,
    ) -> None:
        """Add the sums of a micro-batch of `tokens` answer tokens."""
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0) + value.detach().double()
            self._tokens[key] = self._tokens.get(key, 0) + tokens.double()
            self._micro_batches[key] = self._micro_batches.get(key, 0) + 1
        if ratio_max is not None:
            if self._ratio_max is not None:
                ratio_max = torch.maximum(self._ratio_max, ratio_max)
            self._ratio_max = ratio_max

    def means(self) -> dict[str, float]:
        """Return means over all ranks, and a rank's numbers of updates and micro-batches.

        The means are per answer token; ``train/real_tokens`` is the share of the tokens that were
        computed which are no padding.
        """
        real = torch.as_tensor(self._real)
        computed = torch.full_like(real, self._computed)
        counts = [*self._sums.values(), real, *self._tokens.values(), computed]
        sums, tokens = dist.all_reduce(torch.stack(counts)).chunk(2)
        names = [*self._sums, "train/real_tokens"]
        means = dict(zip(names, (sums / tokens.clamp(min=1)).tolist(), strict=True))
        if self._ratio_max is not None:
            means["policy/ratio_max"] = dist.all_reduce(self._ratio_max, "max").item()
        for name in ("policy", "value"):
            if f"{name}/loss" in means:
                means[f"{name}/micro_batches"] = float(self._micro_batches[f"{name}/loss"])
                means[f"{name}/updates"] = float(self._updates[name])
        means["policy/skipped_steps"] = float(self.skipped)
        return means
