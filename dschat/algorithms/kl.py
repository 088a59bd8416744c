"""KL between policy and reference: estimators on sampled tokens, coefficient of the penalty."""

from dataclasses import dataclass

import torch

# In nats. exp(20) is 5e8: ratios and their products stay finite in fp32.
LOG_RATIO_BOUND = 20.0
K3_BOUND = 10.0  # nats per token


def kl_estimate(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1"
) -> torch.Tensor:
    """Estimate the per-token KL(policy || reference) on tokens sampled from the policy.

    With x = log p - log ref (J. Schulman, "Approximating KL Divergence", 2020):

    - ``k1`` = x: unbiased, may be negative.
    - ``k2`` = x^2 / 2: biased, low variance.
    - ``k3`` = exp(-x) - 1 + x: unbiased, never negative. x is bounded to [-20, 20] and k3 to 10,
      so that one token that the policy has almost ruled out does not decide an update.

    Args:
        logprobs: [B, R], of the policy.
        ref_logprobs: [B, R], of the reference.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        [B, R], nats.

    Raises:
        ValueError: the estimator is unknown.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        return (torch.expm1(-bounded) + bounded).clamp(max=K3_BOUND)
    raise ValueError(f"KL estimator {estimator!r}: k1, k2 and k3 are known.")


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or adaptive if a target is given.

    Adaptive (Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section
    2.2): error = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + error * answers / horizon.
    A rollout of more answers than the horizon counts as one of exactly the horizon, so that the
    factor stays between 0.8 and 1.2.
    """

    coef: float
    target: float | None = None  # nats per answer
    horizon: int = 10000  # answers

    def update(self, kl_per_answer: float, num_answers: int) -> None:
        """Adapt the coefficient to the mean KL per answer (nats) of `num_answers` new answers."""
        if self.target is None:
            return
        error = min(max(kl_per_answer / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(num_answers / self.horizon, 1.0)
