"""Correction of the difference between the generator that sampled and the trainer that learns."""

import torch

from dschat.algorithms.kl import LOG_RATIO_BOUND
from dschat.algorithms.masks import masked_sum


def importance_weights(
    logprobs: torch.Tensor,
    sampled_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    correction: str,
    level: str,
    cap: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weight of each token's policy loss, p_trainer / p_generator, bounded.

    Both probabilities are of the same weights; they differ by kernels and number formats.

    - ``truncate``: min(w, cap) (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
      Off-Policy RL Training", truncated importance sampling).
    - ``mask``: w if 1 / cap <= w <= cap, else 0 (Liu et al. 2025, "When Speed Kills Stability",
      masked importance sampling, with the two-sided bound of IcePop).

    Args:
        logprobs: [B, R], by the trainer.
        sampled_logprobs: [B, R], by the generator.
        mask: [B, R], True on answer tokens; each row has at least one.
        correction: ``truncate`` or ``mask``.
        level: ``token``: w of each token. ``sequence``: the product of an answer's w, for all its
            tokens.
        cap: the bound, above 1.

    Returns:
        [B, R], 1 outside the mask, and statistics: ``bounded``, the number of tokens whose weight
        was changed; ``sum`` and ``squares`` of w before the bound over answer tokens; ``max``, the
        largest w.

    Raises:
        ValueError: the correction or the level is unknown.
    """
    gap = torch.where(mask.bool(), logprobs - sampled_logprobs, torch.zeros_like(logprobs))
    if level == "sequence":
        gap = gap.sum(-1, keepdim=True).expand_as(gap)
    elif level != "token":
        raise ValueError(f"importance level {level!r}: token and sequence are known.")
    ratio = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if correction == "truncate":
        weights = ratio.clamp(max=cap)
    elif correction == "mask":
        weights = torch.where((ratio >= 1.0 / cap) & (ratio <= cap), ratio, 0.0)
    else:
        raise ValueError(f"importance correction {correction!r}: truncate and mask are known.")
    exact = ratio.double()
    stats = {
        "bounded": masked_sum((weights != ratio).double(), mask),
        "sum": masked_sum(exact, mask),
        "squares": masked_sum(exact * exact, mask),
        "max": torch.where(mask.bool(), exact, torch.zeros_like(exact)).max(),
    }
    return torch.where(mask.bool(), weights, torch.ones_like(weights)), stats
