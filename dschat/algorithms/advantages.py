"""Token rewards and advantages, computed from scores."""

import torch

from dschat.algorithms.masks import last_index

# Added to standard deviations that divide.
SMALLEST_DEVIATION = 1e-6


def shape_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    reward_clip: float,
    penalties: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Return the KL penalty of every answer token, plus the score on the last one.

    Each token has r_t = -kl_coef * KL_t; the last one also has clip(score) - penalty. This is
    equation 2 of Ouyang et al. 2022 (InstructGPT), with the KL per token as in Ziegler et al. 2019.
    The clip of the score is DeepSpeed-Chat's. KL and penalties are not clipped.

    Args:
        scores: [B], already normalised.
        kl: [B, R], per-token estimate, nats.
        mask: [B, R], True on answer tokens; each row has at least one.
        kl_coef: the coefficient of the KL penalty.
        reward_clip: scores are clipped to [-reward_clip, reward_clip].
        penalties: [B], or one number for all rows.

    Returns:
        [B, R], 0 outside the mask.
    """
    rewards = torch.where(mask.bool(), -kl_coef * kl, torch.zeros_like(kl))
    last = scores.to(rewards.dtype).clamp(-reward_clip, reward_clip) - penalties
    return rewards.scatter_add(-1, last_index(mask)[:, None], last[:, None])


def overlong_penalty(
    lengths: torch.Tensor, *, max_length: int, buffer: int, penalty: float
) -> torch.Tensor:
    """Return the soft penalty of long answers (Yu et al. 2025, DAPO, equation 13), as [B].

    It is 0 up to `buffer` tokens below the limit, rises linearly, and is `penalty` at the limit.

    Args:
        lengths: [B], tokens of the answers.
        max_length: the length limit.
        buffer: tokens below the limit in which the penalty rises; 0: no penalty.
        penalty: at the limit, in units of the divided reward.
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    excess = (lengths - (max_length - buffer)).float() / buffer
    return penalty * excess.clamp(0.0, 1.0)


def length_adaptive_lam(lengths: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """Return lambda = 1 - 1 / (alpha * length) of each answer, at least 0, as [B].

    The weights of GAE then sum to about alpha * length (Yue et al. 2025, VAPO, equation 8).

    Args:
        lengths: [B], tokens of the answers.
        alpha: 0.05 in the paper.
    """
    return (1.0 - 1.0 / (alpha * lengths.float())).clamp(min=0.0)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the generalised advantage estimate (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}.
    V is 0 after the last token.

    Args:
        rewards: [B, R].
        values: [B, R].
        mask: [B, R], True on answer tokens, which form one run from position 0.
        gamma: the discount.
        lam: lambda of all rows, or of each, [B].

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


def group_advantages(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    *,
    estimator: str,
    num_samples: int,
    gamma: float,
    scale: str = "auto",
) -> torch.Tensor:
    """Compute advantages from the other answers to the same prompt, without a critic.

    R_i is the sum of the rewards of answer i, KL penalty included. A group is the `num_samples`
    answers to one prompt.

    - ``rloo``: R_i minus the mean R of the others, the same at every token (Ahmadian et al. 2024,
      equation 8).
    - ``grpo``: (R_i - mean) / standard deviation of the group, the same at every token (Shao et al.
      2024, section 4.1.2).
    - ``reinforce_baseline``: the discounted rewards from each token to the last, minus the group's
      mean R (Hu et al. 2025, REINFORCE++ with baseline). The caller can whiten them.

    Args:
        rewards: [B, R], 0 outside the mask. The answers to one prompt are neighbours, and B is a
            multiple of `num_samples`.
        mask: [B, R], True on answer tokens.
        estimator: ``rloo``, ``grpo`` or ``reinforce_baseline``.
        num_samples: answers per prompt, at least 2.
        gamma: the discount, read by ``reinforce_baseline`` alone.
        scale: ``group`` divides by the standard deviation of R in the group, and ``none`` does not
            (Liu et al. 2025, Dr. GRPO, section 3.1). ``auto`` divides for ``grpo`` alone.
            ``batch`` does not divide here; see ``batch_scaled``.

    Returns:
        [B, R], 0 outside the mask.

    Raises:
        ValueError: the estimator is unknown.
    """
    # In fp32 equal rewards differ from their mean by a rounding error, which the division of grpo
    # would turn into an advantage.
    exact = rewards.double()
    totals = exact.sum(-1).view(-1, num_samples)
    mean = totals.mean(-1, keepdim=True)
    if estimator == "rloo":
        # R_i - mean of the others = (R_i - mean of all) * n / (n - 1)
        centred = (totals - mean) * (num_samples / (num_samples - 1))
        advantages = centred.view(-1, 1).expand_as(rewards)
    elif estimator == "grpo":
        advantages = (totals - mean).view(-1, 1).expand_as(rewards)
    elif estimator == "reinforce_baseline":
        reward_to_go, _ = gae(exact, torch.zeros_like(exact), mask, gamma=gamma, lam=1.0)
        advantages = reward_to_go - mean.expand_as(totals).reshape(-1, 1)
    else:
        raise ValueError(
            f"advantage estimator {estimator!r}: rloo, grpo and reinforce_baseline need no critic."
        )
    if scale == "group" or (scale == "auto" and estimator == "grpo"):
        deviation = totals.std(-1, keepdim=True) + SMALLEST_DEVIATION
        advantages = advantages / deviation.expand_as(totals).reshape(-1, 1)
    return torch.where(mask.bool(), advantages, torch.zeros_like(exact)).to(rewards.dtype)


def equal_groups(scores: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Return whether all answers of a group have the same score, as [B / num_samples] bool.

    Args:
        scores: [B]; the answers to one prompt are neighbours.
        num_samples: answers per prompt.
    """
    groups = scores.view(-1, num_samples)
    return groups.amax(-1) == groups.amin(-1)


def batch_scaled(advantages: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Divide advantages by the standard deviation of the answers' R over a whole rollout.

    Liu et al. 2025, "Part I: Tricks or Traps?" (Lite PPO), section 3.1: groups of nearly equal
    rewards are then not blown up.

    Args:
        advantages: [B, R].
        totals: ``moments`` of R, the sum of the rewards of an answer, summed over all ranks.

    Returns:
        [B, R].
    """
    count, total, squares = totals
    variance = (squares - total * total / count).clamp(min=0) / (count - 1).clamp(min=1)
    scaled: torch.Tensor = advantages.double() / (variance.sqrt() + SMALLEST_DEVIATION)
    return scaled.to(advantages.dtype)
