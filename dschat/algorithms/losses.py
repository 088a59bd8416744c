"""The losses. Token losses are sums; the caller divides by the tokens of the whole update."""

import torch
import torch.nn.functional as F

from dschat.algorithms.kl import LOG_RATIO_BOUND
from dschat.algorithms.logprobs import token_logprobs
from dschat.algorithms.masks import masked_sum


def lm_loss_rows(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum ``lm_loss_tokens`` over each row.

    Returns:
        nll [B] fp32, and the number of the tokens with a label [B] int64.
    """
    nll, mask = lm_loss_tokens(logits, labels)
    return nll.sum(-1), mask.sum(-1)


def lm_loss_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the negative log-likelihood of each next token.

    Args:
        logits: [B, T, V]; position t predicts ``labels[:, t + 1]``.
        labels: [B, T] int64, -100 on tokens without loss.

    Returns:
        nll [B, T] fp32, 0 if the next token has no label, and whether it has one [B, T] bool.
    """
    # The last position predicts nothing; leaving it in spares a copy of all logits.
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    mask = targets != -100
    logprobs, _ = token_logprobs(logits, targets.clamp(min=0))
    return -torch.where(mask, logprobs, torch.zeros_like(logprobs)), mask


def pairwise_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    margins: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Return the Bradley-Terry loss of each pair (Ouyang et al. 2022, equation 1).

    It is taken on the scores of the last tokens alone, which are also what evaluation and PPO read.

    Args:
        chosen_scores: [B].
        rejected_scores: [B].
        margins: [B], by how much the chosen answer should score higher (Llama 2, section 3.2.2).

    Returns:
        [B] fp32.
    """
    return -F.logsigmoid(chosen_scores.float() - rejected_scores.float() - margins)


def centering_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Return (r_w + r_l)^2 of each pair, as [B] fp32: small if the scores are around 0.

    The Bradley-Terry loss reads differences alone and leaves their level open (Eisenstein et al.
    2023, "Helping or Herding?").

    Args:
        chosen_scores: r_w, [B].
        rejected_scores: r_l, [B].
    """
    return (chosen_scores.float() + rejected_scores.float()) ** 2


def dpo_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, *, label_smoothing: float
) -> torch.Tensor:
    """Return -(1 - e) log sigmoid(r_w - r_l) - e log sigmoid(r_l - r_w), as [B].

    Here e is `label_smoothing`, and r_w and r_l are the rewards of the chosen and of the rejected
    answer. With e = 0 this is equation 7 of Rafailov et al. 2023 (DPO). With e > 0 it is the
    conservative form, for preferences of which a share e is the wrong way round (E. Mitchell, "A
    note on DPO with noisy preferences & relationship to IPO", 2023, equation 3).

    Args:
        chosen_rewards: [B], from ``implicit_rewards``.
        rejected_rewards: [B], from ``implicit_rewards``.
        label_smoothing: e.
    """
    margin = chosen_rewards - rejected_rewards
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_dpo_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, *, label_smoothing: float
) -> torch.Tensor:
    """Return the DPO loss without the bias of swapped labels, as [B].

    It is (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e), with the margin m between the
    rewards. If a share e of the pairs is the wrong way round, its expectation is the loss on the
    right labels (Chowdhury et al. 2024, "Provably Robust DPO", section 3).

    Args:
        chosen_rewards: [B], from ``implicit_rewards``.
        rejected_rewards: [B], from ``implicit_rewards``.
        label_smoothing: e, below 0.5.
    """
    margin = chosen_rewards - rejected_rewards
    right, swapped = F.logsigmoid(margin), F.logsigmoid(-margin)
    biased = -(1.0 - label_smoothing) * right + label_smoothing * swapped
    return biased / (1.0 - 2.0 * label_smoothing)


def hinge_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """Return max(0, 1 - (r_w - r_l)) of each pair, as [B].

    This is the calibration loss of Zhao et al. 2023 (SLiC-HF, equation 1), divided by its margin
    delta, on log ratios to the reference; beta of the rewards is 1 / delta.

    Args:
        chosen_rewards: [B], from ``implicit_rewards``.
        rejected_rewards: [B], from ``implicit_rewards``.
    """
    return F.relu(1.0 - (chosen_rewards - rejected_rewards))


def ipo_loss(
    chosen_log_ratios: torch.Tensor, rejected_log_ratios: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Return (h - 1 / (2 beta))^2 of each pair, as [B], with h the difference of the log ratios.

    Azar et al. 2023 (IPO), equation 17; beta is their tau. The log ratios there are of whole
    answers. Here they may also be means over tokens.

    Args:
        chosen_log_ratios: [B], log pi - log ref of the chosen answers.
        rejected_log_ratios: [B], the same of the rejected answers.
        beta: a smaller one asks for a larger difference.
    """
    return (chosen_log_ratios - rejected_log_ratios - 1.0 / (2.0 * beta)) ** 2


def implicit_rewards(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Return beta * (log pi(y | x) - log ref(y | x)) of whole answers, as [B].

    Rafailov et al. 2023, section 4.
    """
    return beta * (logprobs - ref_logprobs)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    cispo: bool = False,
    ratio_level: str = "token",
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the clipped objective, negated and summed over answer tokens.

    By default it is PPO's, Schulman et al. 2017, equation 7. With `cispo`, it is
    -clip(ratio) * A * log p without gradient through clip(ratio), so that each token keeps its
    gradient (MiniMax 2025, MiniMax-M1, equations 4 and 5).

    Args:
        logprobs: [B, R], of the policy in training.
        old_logprobs: [B, R], of the policy that sampled the tokens.
        advantages: [B, R].
        mask: [B, R], True on answer tokens.
        cliprange: the ratio is clipped to [1 - cliprange, 1 + cliprange_high].
        cliprange_high: default: `cliprange`. A larger one is the clip-higher of Yu et al. 2025
            (DAPO, section 3.1).
        dual_clip: the loss of a token with a negative advantage is at most -dual_clip * A (Ye et
            al. 2020, "Mastering Complex Control in MOBA Games", equation 5). None: no bound.
        cispo: see above.
        ratio_level: see ``bounded_log_ratio``.
        weights: of the tokens in the sum, [B, R] or [B, 1]. None: 1 each.

    Returns:
        The loss sum (scalar), and statistics without gradient:

        - ``clipped``: the number of tokens whose loss the clip changes.
        - ``approx_kl``: the sum of (ratio - 1) - log ratio (k3 of old against new policy).
        - ``ratio_max``: the largest ratio of an answer token, 0 if there is no answer token.
    """
    log_ratio = bounded_log_ratio(logprobs, old_logprobs, mask, level=ratio_level)
    ratio = log_ratio.exp()
    high = cliprange if cliprange_high is None else cliprange_high
    bounded = ratio.clamp(1.0 - cliprange, 1.0 + high)
    if cispo:
        losses = -bounded.detach() * advantages * logprobs
        is_clipped = bounded != ratio
    else:
        unclipped = -advantages * ratio
        clipped = -advantages * bounded
        losses = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
        if dual_clip is not None:
            most = -dual_clip * advantages
            is_bounded = (advantages < 0) & (losses > most)
            losses = torch.where(is_bounded, most, losses)
            is_clipped = is_clipped | is_bounded
    loss = masked_sum(losses if weights is None else losses * weights, mask)
    with torch.no_grad():
        stats = {
            "clipped": masked_sum(is_clipped.float(), mask),
            "approx_kl": masked_sum(torch.expm1(log_ratio) - log_ratio, mask),
            # Ratios are above 0, so that the zeros outside the mask never win.
            "ratio_max": torch.where(mask.bool(), ratio, torch.zeros_like(ratio)).max(),
        }
    return loss, stats


def bounded_log_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, *, level: str
) -> torch.Tensor:
    """Return the log of the probability ratio [B, R], in [-20, 20] and 0 outside the mask.

    The bound keeps the ratio and its products finite in fp32; beyond it there is no gradient.

    Args:
        logprobs: [B, R], of the policy in training.
        old_logprobs: [B, R], of the policy that sampled the tokens.
        mask: [B, R], True on answer tokens.
        level: ``token``: log p - log p_old of each token. ``sequence``: its mean over the answer,
            the same value at each token, with the gradient of the token's own log p (Zheng et al.
            2025, GSPO, equations 7 and 13).

    Raises:
        ValueError: the level is unknown.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs))
    if level == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = log_ratio.detach().sum(-1, keepdim=True) / lengths
        log_ratio = torch.where(mask.bool(), mean + (log_ratio - log_ratio.detach()), 0.0)
    elif level != "token":
        raise ValueError(f"ratio level {level!r}: token and sequence are known.")
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def aggregation_weights(mask: torch.Tensor, aggregation: str) -> torch.Tensor | None:
    """Return the weight [B, 1] of each row's tokens in the sum of the loss; None if all are 1.

    With ``aggregation_count`` as the divisor:

    - ``token``: the mean over all tokens of the update (Yu et al. 2025, DAPO, section 3.3).
    - ``sequence``: the mean over answers of the mean over an answer's tokens (Shao et al. 2024,
      GRPO, equation 3).
    - ``constant``: the sum over tokens, divided by answers times the length limit (Liu et al. 2025,
      Dr. GRPO, section 3.2), so that no length enters.

    Args:
        mask: [B, R], True on the tokens that are learned.
        aggregation: ``token``, ``sequence`` or ``constant``.
    """
    if aggregation == "sequence":
        return 1.0 / mask.sum(-1, keepdim=True).clamp(min=1).float()
    return None


def aggregation_count(mask: torch.Tensor, aggregation: str, *, max_length: int) -> torch.Tensor:
    """Return the number (int64 scalar) that divides the sum of these rows' losses.

    Add those of all micro-batches and ranks of an update. See ``aggregation_weights``.

    Args:
        mask: [B, R], True on the tokens that are learned.
        aggregation: ``token``, ``sequence`` or ``constant``.
        max_length: the length limit of answers, in tokens.

    Raises:
        ValueError: the aggregation is unknown.
    """
    if aggregation == "token":
        return mask.sum()
    if aggregation == "sequence":
        return mask.any(-1).sum()
    if aggregation == "constant":
        return mask.any(-1).sum() * max_length
    raise ValueError(f"loss aggregation {aggregation!r}: token, sequence and constant are known.")


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange_value: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute 0.5 * max((V - R)^2, (clip(V) - R)^2), summed over answer tokens.

    clip(V) is at most `cliprange_value` from the old value. The clip is that of OpenAI's PPO
    implementation (baselines, ppo2), which DeepSpeed-Chat follows.

    Args:
        values: [B, R], V of the critic in training.
        old_values: [B, R], V before the update.
        returns: [B, R], R.
        mask: [B, R], True on answer tokens.
        cliprange_value: how far V may move from its old value.

    Returns:
        The loss sum (scalar), and without gradient ``clipped``, the number of tokens whose loss the
        clip changes.
    """
    bounded = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors, bounded_errors = (values - returns) ** 2, (bounded - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(errors, bounded_errors), mask)
    return loss, {"clipped": masked_sum((bounded_errors > errors).float(), mask).detach()}


def explained_variance(totals: torch.Tensor) -> float:
    """Return 1 - Var(R - V) / Var(R), from ``value_moments`` summed over ranks.

    NaN if the returns are constant.
    """
    count, total, squares, error_total, error_squares = totals.tolist()
    variance = squares / count - (total / count) ** 2
    error_variance = error_squares / count - (error_total / count) ** 2
    return 1.0 - error_variance / variance if variance > 0 else float("nan")


def value_moments(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [5] float64 moments under `mask`.

    Count, sum and squares of the returns, then sum and squares of (returns - values).
    """
    returns, errors = returns.double(), (returns - values).double()
    sums = [masked_sum(x, mask) for x in (returns, returns**2, errors, errors**2)]
    return torch.stack([mask.bool().sum().double(), *sums])
