"""From scores to advantages."""

import torch

from dschat.algorithms.masks import last_index


def shape_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coef: float, reward_clip: float
) -> torch.Tensor:
    """r_t = -kl_coef * KL_t on every answer token, plus the clipped score on the last one.

    Ouyang et al. 2022 (InstructGPT), equation 2, with the KL per token as in Ziegler et al. 2019; the clip of the
    score is DeepSpeed-Chat's. The KL part is not clipped.

    Args:
        scores: [B], already normalised.
        kl: [B, R], per-token estimate, nats.
        mask: [B, R], True on answer tokens; each row has at least one.

    Returns:
        [B, R], 0 outside the mask.
    """
    rewards = torch.where(mask.bool(), -kl_coef * kl, torch.zeros_like(kl))
    clipped = scores.to(rewards.dtype).clamp(-reward_clip, reward_clip)
    return rewards.scatter_add(-1, last_index(mask)[:, None], clipped[:, None])


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  V is 0 behind the last token.

    Args:
        rewards, values: [B, R].
        mask: [B, R], True on answer tokens, which form one run from position 0.

    Returns:
        advantages [B, R] and returns = advantages + values [B, R], both 0 outside the mask.
    """
    live = mask.to(values.dtype)
    rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards))
    values = torch.where(mask.bool(), values, torch.zeros_like(values))
    advantages = torch.zeros_like(values)
    following_value = following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[-1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = (delta + gamma * lam * following) * live[:, t]
        advantages[:, t] = following
        following_value = values[:, t]
    return advantages, advantages + values
