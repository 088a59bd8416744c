"""Variants of the objective: numbers by hand, and the papers' equations as plain loops."""

import itertools
import math

import pytest
import torch

from dschat.algorithms.advantages import (
    batch_scaled,
    gae,
    group_advantages,
    length_adaptive_lam,
    overlong_penalty,
)
from dschat.algorithms.importance import importance_weights
from dschat.algorithms.kl import kl_estimate
from dschat.algorithms.losses import aggregation_count, aggregation_weights, policy_loss
from dschat.algorithms.masks import moments

ONE = torch.ones(1, 1, dtype=torch.bool)


def one_token(log_ratio: float, advantage: float, **options):
    """Return loss, gradient of the logprob and number of clipped tokens of one token."""
    logprobs = torch.tensor([[log_ratio - 1.0]], requires_grad=True)
    old = torch.tensor([[-1.0]])
    advantages = torch.tensor([[advantage]])
    loss, stats = policy_loss(logprobs, old, advantages, ONE, **options)
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats["clipped"].item()


def ragged(seed: int, rows: int = 6, length: int = 9):
    """Return logprobs, old logprobs, advantages [B, R] in float64, and a ragged mask."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    mask = torch.arange(length) < lengths
    logprobs, noise, advantages = (
        torch.randn(rows, length, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    logprobs = -logprobs.abs()
    return logprobs, logprobs + 0.4 * noise, advantages, mask


def test_clip_higher_by_hand():
    ratio = math.log(1.25)
    # The clip at 1.2 bites, the one at 1.28 does not.
    loss, grad, clipped = one_token(ratio, 2.0, cliprange=0.2)
    assert (loss, grad, clipped) == (pytest.approx(-2.4), 0.0, 1.0)
    loss, grad, clipped = one_token(ratio, 2.0, cliprange=0.2, cliprange_high=0.28)
    assert (loss, grad, clipped) == (pytest.approx(-2.5), pytest.approx(-2.5), 0.0)
    # The lower bound stays: ratio 0.75 is clipped to 0.8 for a negative advantage.
    loss, _, clipped = one_token(math.log(0.75), -1.0, cliprange=0.2, cliprange_high=0.28)
    assert (loss, clipped) == (pytest.approx(0.8), 1.0)


def test_dual_clip_by_hand():
    loss, grad, clipped = one_token(math.log(5.0), -2.0, cliprange=0.2)
    assert (loss, grad, clipped) == (pytest.approx(10.0), pytest.approx(10.0), 0.0)
    loss, grad, clipped = one_token(math.log(5.0), -2.0, cliprange=0.2, dual_clip=3.0)
    assert (loss, grad, clipped) == (pytest.approx(6.0), 0.0, 1.0)
    # No bound for positive advantages, nor below it.
    assert one_token(math.log(5.0), 2.0, cliprange=9.0, dual_clip=3.0)[0] == pytest.approx(-10.0)
    assert one_token(math.log(2.5), -2.0, cliprange=0.2, dual_clip=3.0)[2] == 0.0


def test_cispo_by_hand():
    # ratio 1.5 is clipped to 1.2 but the token keeps the gradient -1.2 * A of its logprob.
    loss, grad, clipped = one_token(math.log(1.5), 2.0, cliprange=0.2, cispo=True)
    assert loss == pytest.approx(-1.2 * 2.0 * (math.log(1.5) - 1.0))
    assert (grad, clipped) == (pytest.approx(-2.4), 1.0)
    loss, grad, clipped = one_token(math.log(0.1), 2.0, cliprange=1.0, cispo=True)
    assert (grad, clipped) == (pytest.approx(-0.2), 0.0)


def test_sequence_ratio_by_hand():
    # Log ratios 0.3 and -0.1: the answer's ratio is exp(0.1) at both tokens.
    old = torch.tensor([[-1.0, -2.0, -9.0]])
    logprobs = torch.tensor([[-0.7, -2.1, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    advantages = torch.full((1, 3), 2.0)
    weights = aggregation_weights(mask, "sequence")
    loss, stats = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        cliprange=0.2,
        ratio_level="sequence",
        weights=weights,
    )
    loss.backward()
    ratio = math.exp(0.1)
    assert loss.item() == pytest.approx(-2.0 * ratio)
    # The gradient of -A exp(mean log ratio) is -A ratio / 2 for each of the two tokens.
    assert logprobs.grad[0].tolist() == pytest.approx([-ratio, -ratio, 0.0])
    assert stats["ratio_max"].item() == pytest.approx(ratio)
    with pytest.raises(ValueError, match="word"):
        policy_loss(logprobs, old, advantages, mask, cliprange=0.2, ratio_level="word")


def test_aggregations_by_hand():
    # Two answers of 1 and 3 tokens with losses 6 and 1, 2, 3; a third is left out.
    losses = torch.tensor([[6.0, 0.0, 0.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    lengths = torch.tensor([[1], [3], [0]])
    mask = torch.arange(3) < lengths
    expected = {"token": 12 / 4, "sequence": (6 + 2) / 2, "constant": 12 / (2 * 10)}
    for aggregation, value in expected.items():
        weights = aggregation_weights(mask, aggregation)
        weighted = losses if weights is None else losses * weights
        count = aggregation_count(mask, aggregation, max_length=10)
        found = torch.where(mask, weighted, 0.0).sum() / count
        assert found.item() == pytest.approx(value), aggregation
    with pytest.raises(ValueError, match="word"):
        aggregation_count(mask, "word", max_length=10)


OPTIONS = list(
    itertools.product(
        (None, 0.5), (None, 1.6), (False, True), ("token", "sequence"), ("token", "sequence")
    )
)


def looped_loss(logprobs, old, advantages, mask, *, high, dual, cispo, level, aggregation):
    """Return the mean loss as the papers write it: answer by answer and token by token."""
    low = 0.2
    high = low if high is None else high
    per_answer = []
    for b in range(len(mask)):
        length = int(mask[b].sum())
        x, y, a = (t[b, :length] for t in (logprobs, old, advantages))
        if level == "token":
            ratios = torch.exp(x - y)
        else:
            # GSPO-token, equation 13: sg[s_i] * pi / sg[pi].
            whole = (torch.prod(torch.exp(x - y)) ** (1 / length)).detach()
            ratios = whole * torch.exp(x) / torch.exp(x).detach()
        terms = []
        for t in range(length):
            r = ratios[t]
            inside = min(max(r.item(), 1 - low), 1 + high)
            if cispo:
                terms.append(inside * a[t] * x[t])
                continue
            gain = torch.min(r * a[t], inside * a[t] if inside != r.item() else r * a[t])
            if dual is not None and a[t] < 0:
                gain = torch.max(gain, dual * a[t])
            terms.append(gain)
        per_answer.append(terms)
    if aggregation == "token":
        everything = [term for terms in per_answer for term in terms]
        return -sum(everything) / len(everything)
    return -sum(sum(terms) / len(terms) for terms in per_answer) / len(per_answer)


@pytest.mark.parametrize("high,dual,cispo,level,aggregation", OPTIONS)
def test_losses_and_gradients_equal_plain_loops(high, dual, cispo, level, aggregation):
    for seed in range(3):
        logprobs, old, advantages, mask = ragged(seed)
        mine, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        loss, _ = policy_loss(
            mine,
            old,
            advantages,
            mask,
            cliprange=0.2,
            cliprange_high=high,
            dual_clip=dual,
            cispo=cispo,
            ratio_level=level,
            weights=aggregation_weights(mask, aggregation),
        )
        loss = loss / aggregation_count(mask, aggregation, max_length=9)
        options = dict(high=high, dual=dual, cispo=cispo, level=level, aggregation=aggregation)
        expected = looped_loss(theirs, old, advantages, mask, **options)
        loss.backward()
        expected.backward()
        # The weights of single rows are in fp32.
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)


def test_the_defaults_compute_the_same_bits_as_ppo_alone():
    logprobs, old, advantages, mask = (t.float() for t in ragged(5))
    mask = mask.bool()
    x, y = (logprobs.clone().requires_grad_() for _ in range(2))
    loss, _ = policy_loss(x, old, advantages, mask, cliprange=0.2)
    ratio = torch.where(mask, y - old, torch.zeros_like(y)).exp()
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    plain = torch.where(mask, terms, torch.zeros_like(terms)).sum()
    loss.backward()
    plain.backward()
    assert loss.item() == plain.item() and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
def test_huge_log_ratios_stay_finite(log_ratio):
    loss, grad, _ = one_token(log_ratio, -1.0, cliprange=0.2)
    assert math.isfinite(loss) and math.isfinite(grad)
    kl = kl_estimate(torch.tensor([[0.0]]), torch.tensor([[log_ratio]]), "k3")
    assert 0 <= kl.item() <= 10.0


def test_k3_is_bounded_to_10():
    logprobs = torch.tensor([[-30.0, -1.0]])
    ref = torch.tensor([[-1.0, -1.5]])
    assert kl_estimate(logprobs, ref, "k3")[0].tolist() == pytest.approx(
        [10.0, math.exp(-0.5) - 1 + 0.5]
    )


def test_advantage_scales_by_hand():
    # Groups with R = (0, 2) and (1, 5): means 1 and 3, deviations sqrt(2) and sqrt(8).
    rewards = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0], [5.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    common = dict(num_samples=2, gamma=1.0)

    def first_tokens(estimator, scale):
        return group_advantages(rewards, mask, estimator=estimator, scale=scale, **common)[
            :, 0
        ].tolist()

    half = math.sqrt(0.5)
    assert first_tokens("grpo", "none") == [-1.0, 1.0, -2.0, 2.0]
    assert first_tokens("grpo", "batch") == [-1.0, 1.0, -2.0, 2.0]
    assert first_tokens("grpo", "auto") == pytest.approx([-half, half, -half, half], abs=1e-5)
    assert first_tokens("grpo", "group") == first_tokens("grpo", "auto")
    assert first_tokens("rloo", "auto") == first_tokens("rloo", "none") == [-2.0, 2.0, -4.0, 4.0]
    assert first_tokens("rloo", "group") == pytest.approx([-2 * half, 2 * half] * 2, abs=1e-5)
    # From the first token: 2 - 1 and 5 - 3; then divided by the deviations of the groups.
    assert first_tokens("reinforce_baseline", "group") == pytest.approx(
        [-half, half, -half, half], abs=1e-5
    )
    totals = moments(rewards.sum(-1), torch.ones(4))
    scaled = batch_scaled(torch.tensor([[-1.0], [2.0]]), totals)
    deviation = torch.tensor([0.0, 2.0, 1.0, 5.0]).std().item()
    assert scaled.flatten().tolist() == pytest.approx([-1 / deviation, 2 / deviation], abs=1e-5)


def test_the_overlong_penalty_by_hand():
    # DAPO's equation 13 with L_max 20 and L_cache 8.
    lengths = torch.tensor([1, 12, 14, 16, 20])
    found = overlong_penalty(lengths, max_length=20, buffer=8, penalty=1.0)
    assert found.tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]
    assert overlong_penalty(lengths, max_length=20, buffer=8, penalty=3.0)[-1] == 3.0
    assert not overlong_penalty(lengths, max_length=20, buffer=0, penalty=1.0).any()


def test_length_adaptive_lambda_by_hand():
    found = length_adaptive_lam(torch.tensor([1, 20, 40, 400]), alpha=0.05)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.95])


def test_gae_takes_a_lambda_for_each_row():
    _, _, values, mask = ragged(1)
    rewards = ragged(2)[0]
    lams = torch.linspace(0.1, 0.9, len(mask), dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=lams)
    for b, lam in enumerate(lams.tolist()):
        row = slice(b, b + 1)
        alone = gae(rewards[row], values[row], mask[row], gamma=0.9, lam=lam)
        torch.testing.assert_close(advantages[row], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row], alone[1], rtol=0, atol=1e-12)


# Two tokens with w = 3 and 0.5; the third is padding.
SAMPLED = torch.log(torch.tensor([[0.1, 0.4, 1.0]]))
TRAINED = torch.log(torch.tensor([[0.3, 0.2, 0.5]]))
TWO = torch.tensor([[True, True, False]])
IMPORTANCE = {
    ("truncate", "token", 2.0): ([2.0, 0.5, 1.0], 1),
    ("mask", "token", 2.5): ([0.0, 0.5, 1.0], 1),
    ("mask", "token", 1.5): ([0.0, 0.0, 1.0], 2),
    ("truncate", "sequence", 2.0): ([1.5, 1.5, 1.0], 0),
    ("mask", "sequence", 1.2): ([0.0, 0.0, 1.0], 2),
}


@pytest.mark.parametrize("correction,level,cap", IMPORTANCE)
def test_importance_weights_by_hand(correction, level, cap):
    expected, bounded = IMPORTANCE[correction, level, cap]
    weights, stats = importance_weights(
        TRAINED, SAMPLED, TWO, correction=correction, level=level, cap=cap
    )
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert stats["bounded"].item() == bounded
    unbounded = [3.0, 0.5] if level == "token" else [1.5, 1.5]
    assert stats["max"].item() == pytest.approx(max(unbounded), rel=1e-5)
    assert stats["sum"].item() == pytest.approx(sum(unbounded), rel=1e-5)
    assert stats["squares"].item() == pytest.approx(sum(w * w for w in unbounded), rel=1e-5)


def test_unknown_importance_options_are_refused():
    for options in (dict(correction="x", level="token"), dict(correction="mask", level="x")):
        with pytest.raises(ValueError, match="'x'"):
            importance_weights(TRAINED, SAMPLED, TWO, cap=2.0, **options)


def test_weights_multiply_each_token():
    logprobs, old, advantages, mask = ragged(3)
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).double()
    options = dict(cliprange=0.2)
    whole, _ = policy_loss(logprobs, old, advantages, mask, weights=weights, **options)
    parts = 0.0
    for b, t in mask.nonzero().tolist():
        cell = (slice(b, b + 1), slice(t, t + 1))
        loss, _ = policy_loss(logprobs[cell], old[cell], advantages[cell], ONE, **options)
        parts += loss.item() * weights[b, t].item()
    assert whole.item() == pytest.approx(parts)
