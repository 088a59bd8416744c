"""The mathematics against numbers worked out by hand, and against plain loops in float64."""

import math

import pytest
import torch

from dschat.algorithms.advantages import gae, group_advantages, shape_rewards
from dschat.algorithms.kl import KLController, kl_estimate
from dschat.algorithms.logprobs import FusedLogprobs, full_kl, token_logprobs
from dschat.algorithms.losses import (
    centering_loss,
    dpo_loss,
    explained_variance,
    implicit_rewards,
    lm_loss_rows,
    pairwise_loss,
    policy_loss,
    value_loss,
    value_moments,
)
from dschat.algorithms.masks import (
    last_index,
    masked_mean,
    masked_sum,
    masked_whiten,
    mean_and_std,
    moments,
    pool_last,
)
from dschat.algorithms.types import TextBatch


def random_rows(batch=5, length=7, seed=0):
    """Values [B, R] in float64 and a mask of answers of every length from 1 to R."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1 + i % length for i in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    return [torch.randn(batch, length, generator=draw, dtype=torch.float64) for _ in range(4)], mask


def test_last_index_and_pooling_work_on_both_paddings():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    assert last_index(mask).tolist() == [1, 3, 2]
    assert pool_last(torch.arange(12.0).view(3, 4), mask).tolist() == [1.0, 7.0, 10.0]


def test_masked_sums_ignore_values_outside_even_nan():
    values = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(values, mask).item() == 4.0
    assert masked_mean(values, mask).item() == 2.0
    assert mean_and_std(moments(values, mask))[1].item() == 1.0


def test_whitening_by_hand_and_over_two_ranks():
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(
        masked_whiten(values, mask), torch.tensor([[-1.0, 1.0, 0.0]]), rtol=0, atol=1e-6
    )
    (rows, *_), mask = random_rows(batch=8)
    whole = masked_whiten(rows, mask)
    totals = moments(rows[:3], mask[:3]) + moments(rows[3:], mask[3:])
    parts = [masked_whiten(rows[s], mask[s], totals) for s in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_shape_rewards_by_hand():
    kl = torch.tensor([[0.5, -0.5, 9.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = shape_rewards(torch.tensor([7.0, -1.0]), kl, mask, kl_coef=0.1, reward_clip=5.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 5.05, 0.0], [-0.1, -0.2, -1.3]]))


def test_no_penalty_is_hidden_by_the_clip_of_the_score():
    kl, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    penalties = torch.tensor([1.0, 0.0, 1.0, 3.0])
    options = dict(kl_coef=0.1, reward_clip=5.0)
    rewards = shape_rewards(
        torch.tensor([9.0, 9.0, -9.0, 2.0]), kl, mask, penalties=penalties, **options
    )
    assert rewards.tolist() == [[0.0, 4.0], [0.0, 5.0], [0.0, -6.0], [0.0, -1.0]]


def test_gae_by_hand():
    # gamma 0.5, lam 0.5: delta = (0 + 0.5*2 - 1, 1 + 0.5*4 - 2, 3 - 4) = (0, 1, -1).
    # A2 = -1, A1 = 1 - 0.25, A0 = 0.1875.
    rewards, values = torch.tensor([[0.0, 1.0, 3.0, 50.0]]), torch.tensor([[1.0, 2.0, 4.0, 70.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.1875, 0.75, -1.0, 0.0]]
    assert returns.tolist() == [[1.1875, 2.75, 3.0, 0.0]]


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0)])
def test_gae_equals_its_definition_as_a_sum(gamma, lam):
    (rewards, values, *_), mask = random_rows()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, length in enumerate(mask.sum(-1).tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_tokens_after_the_answer_change_nothing():
    (rewards, values, logprobs, old), mask = random_rows()
    spoiled = [
        torch.where(mask, x, torch.full_like(x, float("nan")))
        for x in (rewards, values, logprobs, old)
    ]
    for clean, dirty in zip(
        gae(rewards, values, mask, gamma=1.0, lam=0.95),
        gae(*spoiled[:2], mask, gamma=1.0, lam=0.95),
    ):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)
    assert (
        policy_loss(logprobs, old, rewards, mask, cliprange=0.2)[0]
        == policy_loss(spoiled[2], spoiled[3], spoiled[0], mask, cliprange=0.2)[0]
    )


def test_kl_estimators_by_hand():
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert kl_estimate(logprobs, ref, "k1").tolist() == [[0.5, -1.0]]
    assert kl_estimate(logprobs, ref, "k2").tolist() == [[0.125, 0.5]]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert kl_estimate(logprobs, ref, "k3")[0].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(logprobs, ref, "k9")


def test_k1_and_k3_estimate_the_exact_kl():
    draw = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(1, 1, 6, generator=draw) for _ in range(2))
    p, q = logits.log_softmax(-1).flatten(), ref_logits.log_softmax(-1).flatten()
    exact = full_kl(logits, ref_logits).item()
    assert exact == pytest.approx(
        sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist())), abs=1e-6
    )
    for estimator in ("k1", "k3"):
        mean = (p.exp() * kl_estimate(p, q, estimator)).sum().item()
        assert mean == pytest.approx(exact, abs=1e-6)


def test_adaptive_kl_coefficient_by_hand():
    controller = KLController(0.1, target=5.0, horizon=1000)
    controller.update(20.0, 100)  # error 3, clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 100 / 1000))
    controller.update(4.5, 500)  # error -0.1
    assert controller.coef == pytest.approx(0.102 * (1 - 0.1 * 0.5))
    fixed = KLController(0.1)
    fixed.update(20.0, 100)
    assert fixed.coef == 0.1


def test_the_adaptive_coefficient_stays_positive_with_more_answers_than_its_horizon():
    controller = KLController(0.1, target=5.0, horizon=100)
    controller.update(0.0, 1024)  # error -0.2; taken as a horizon's worth of answers
    assert controller.coef == pytest.approx(0.08)


def test_the_exact_kl_leaves_out_what_neither_can_say():
    barred = torch.tensor([[[0.0, math.log(3.0), -float("inf")]]])
    other = torch.tensor([[[0.0, 0.0, -float("inf")]]])
    assert full_kl(barred, other).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )
    assert full_kl(torch.zeros(1, 1, 3), other).item() == float(
        "inf"
    )  # what the reference alone cannot say


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 1e-6)])
def test_chunked_logprobs_and_entropy_equal_a_plain_loop(dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 11, generator=draw)).to(dtype)
    tokens = torch.randint(11, (3, 5), generator=draw)
    logprobs, entropy = token_logprobs(logits, tokens, temperature=0.7, chunk_elements=40)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for b in range(3):
        for t in range(5):
            row = [x / 0.7 for x in logits[b, t].double().tolist()]
            normaliser = math.log(sum(math.exp(x) for x in row))
            assert logprobs[b, t].item() == pytest.approx(
                row[tokens[b, t]] - normaliser, rel=tolerance, abs=5e-6
            )
            expected = -sum(math.exp(x - normaliser) * (x - normaliser) for x in row)
            assert entropy[b, t].item() == pytest.approx(expected, rel=tolerance, abs=5e-6)


def test_chunked_logprobs_have_the_plain_gradient_and_keep_no_fp32_copy():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(9, (2, 3), generator=draw)
    logprobs, entropy = token_logprobs(logits, tokens, chunk_elements=18)
    (gradient,) = torch.autograd.grad((logprobs - 0.1 * entropy).sum(), logits)
    plain = logits.log_softmax(-1)
    expected = plain.gather(-1, tokens[..., None]).sum() + 0.1 * (plain.exp() * plain).sum()
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-6
    )


def test_entropy_of_a_masked_vocabulary_is_finite():
    logits = torch.tensor([[[0.0, 0.0, -float("inf")]]], requires_grad=True)
    _, entropy = token_logprobs(logits, torch.zeros(1, 1, dtype=torch.long))
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.sum().backward()
    assert logits.grad.abs().max() < 1e-6  # the most that two tokens have


def test_the_gradient_of_the_entropy_is_finite_beside_barred_tokens():
    logits = torch.tensor([[[1.0, 0.0, -float("inf")]]], requires_grad=True)
    token_logprobs(logits, torch.zeros(1, 1, dtype=torch.long))[1].sum().backward()
    p = 1 / (1 + math.exp(-1.0))
    slope = -p * (1 - p)  # dH/dx for two tokens with logits x and 0, times x = 1
    assert logits.grad.flatten().tolist() == pytest.approx([slope, -slope, 0.0], abs=1e-6)


def test_policy_loss_by_hand():
    # Ratios 1.5 and 0.5, clip 0.2. A > 0: min(1.5, 1.2) = 1.2; A < 0: min(-0.5, -0.8) = -0.8.
    # The masked token adds nothing.
    old = torch.zeros(1, 3)
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5), 4.0]])
    advantages, mask = torch.tensor([[2.0, -1.0, 5.0]]), torch.tensor([[True, True, False]])
    loss, stats = policy_loss(logprobs, old, advantages, mask, cliprange=0.2)
    assert loss.item() == pytest.approx(-(2 * 1.2) + 0.8, abs=1e-6)
    assert stats["clipped"].item() == 2
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    expected = (1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5))
    assert stats["approx_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_the_largest_ratio_is_that_of_an_answer_token():
    """Check that the 1 of masked positions is left out.

    It would hide a policy that became less sure of every token.
    """
    mask = torch.tensor([[True, True, False]])
    logprobs, zeros = torch.full((1, 3), math.log(0.9)), torch.zeros(1, 3)
    assert policy_loss(logprobs, zeros, zeros, mask, cliprange=0.2)[1][
        "ratio_max"
    ].item() == pytest.approx(0.9)
    assert (
        policy_loss(logprobs, zeros, zeros, mask & False, cliprange=0.2)[1]["ratio_max"].item() == 0
    )


def test_policy_loss_has_no_gradient_where_the_clip_bites():
    logprobs = torch.tensor([[math.log(1.5), math.log(1.1), math.log(0.5)]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 1.0]])
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), advantages, torch.ones(1, 3), cliprange=0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1.1, -0.5]]))


def test_value_loss_by_hand():
    # V moves 0 -> 1, may move 0.2.
    # R = 2: max(1, 3.24), clipped; R = 0.1: max(0.81, 0.01), not clipped.
    values, old = torch.tensor([[1.0, 1.0, 8.0]]), torch.zeros(1, 3)
    returns, mask = torch.tensor([[2.0, 0.1, 0.0]]), torch.tensor([[True, True, False]])
    loss, stats = value_loss(values, old, returns, mask, cliprange_value=0.2)
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.81), abs=1e-6)
    assert stats["clipped"].item() == 1


def test_pairwise_loss_by_hand():
    loss = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
    assert loss.tolist() == pytest.approx(
        [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))], abs=1e-6
    )


def test_centering_loss_by_hand():
    loss = centering_loss(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([-1.0, 0.5, -1.0]))
    assert loss.tolist() == [0.0, 6.25, 16.0]


def test_lm_loss_rows_counts_labelled_tokens_only():
    logits = torch.zeros(2, 4, 10)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 1, -100, -100]])
    nll, tokens = lm_loss_rows(logits, labels)
    assert tokens.tolist() == [2, 1]
    assert nll.tolist() == pytest.approx([2 * math.log(10), math.log(10)], abs=1e-6)


def test_lm_loss_reads_the_position_before_each_label():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 100.0  # position 1 predicts token 2
    nll, _ = lm_loss_rows(logits, torch.tensor([[-100, -100, 2]]))
    assert nll.item() == pytest.approx(0.0, abs=1e-6)


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[0.0, 2.0, 4.0]]), torch.ones(1, 3)
    assert explained_variance(value_moments(returns, returns, mask)) == pytest.approx(1.0)
    assert explained_variance(
        value_moments(torch.full((1, 3), 9.0), returns, mask)
    ) == pytest.approx(0.0)
    # errors (0, 1, 2): variance 2/3 against 8/3
    assert explained_variance(
        value_moments(torch.tensor([[0.0, 1.0, 2.0]]), returns, mask)
    ) == pytest.approx(0.75)


def test_group_advantages_by_hand():
    # One prompt, answers with R = 3 and 1; and one with R = 0 and 4, the second one token long.
    rewards = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0], [4.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])

    def estimate(name):
        return group_advantages(rewards, mask, estimator=name, num_samples=2, gamma=1.0)

    assert estimate("rloo").tolist() == [[2.0, 2.0], [-2.0, -2.0], [-4.0, -4.0], [4.0, 0.0]]
    scale = 1 / math.sqrt(2)  # a group (x, y) has mean +- d/2 and sample deviation d / sqrt(2)
    expected = torch.tensor([[scale, scale], [-scale, -scale], [-scale, -scale], [scale, 0.0]])
    torch.testing.assert_close(estimate("grpo"), expected, rtol=0, atol=1e-5)
    # Rewards to go, minus the group's mean R of 2.
    assert estimate("reinforce_baseline").tolist() == [
        [1.0, 0.0],
        [-1.0, -1.0],
        [-2.0, -1.0],
        [2.0, 0.0],
    ]
    with pytest.raises(ValueError, match="gae"):
        estimate("gae")


@pytest.mark.parametrize("num_samples", [3, 8, 16])
@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce_baseline"])
def test_equal_rewards_have_no_advantage_at_all(estimator, num_samples):
    groups = 10 * torch.randn(1000, generator=torch.Generator().manual_seed(num_samples))
    rewards = groups.repeat_interleave(num_samples)[:, None]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    found = group_advantages(rewards, mask, estimator=estimator, num_samples=num_samples, gamma=1.0)
    assert found.dtype == torch.float32 and not found.any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("estimator", ["grpo", "reinforce_baseline"])
def test_grpo_and_reinforce_baseline_equal_a_plain_loop(estimator, gamma):
    (rewards, *_), mask = random_rows(batch=8)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    found = group_advantages(rewards, mask, estimator=estimator, num_samples=4, gamma=gamma)
    for start in (0, 4):
        totals = [sum(row) for row in rewards[start : start + 4].tolist()]
        mean = sum(totals) / 4
        deviation = math.sqrt(sum((total - mean) ** 2 for total in totals) / 3)
        for i, row in enumerate(rewards[start : start + 4].tolist(), start):
            for t in range(int(mask[i].sum())):
                to_go = sum(gamma**k * reward for k, reward in enumerate(row[t:]))
                expected = (
                    (totals[i - start] - mean) / (deviation + 1e-6)
                    if estimator == "grpo"
                    else to_go - mean
                )
                assert found[i, t].item() == pytest.approx(expected, abs=1e-12)
    assert not found[~mask].any()


@pytest.mark.parametrize("num_samples", [2, 4])
def test_rloo_equals_leaving_one_out_in_a_loop(num_samples):
    (rewards, *_), mask = random_rows(batch=8)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    found = group_advantages(rewards, mask, estimator="rloo", num_samples=num_samples, gamma=1.0)
    totals = rewards.sum(-1).tolist()
    for i, total in enumerate(totals):
        start = i - i % num_samples
        others = [totals[j] for j in range(start, start + num_samples) if j != i]
        assert found[i, 0].item() == pytest.approx(total - sum(others) / len(others), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_logprobs_are_those_of_the_plain_path(temperature):
    """The passes that a GPU compiles give the results and gradients of the chunked path."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 11, generator=draw, dtype=torch.float64)
    logits[0, 0, 3] = float("-inf")
    tokens = torch.randint(4, 11, (2, 5), generator=draw)
    weights = torch.randn(2, 2, 5, generator=draw)

    def run(function):
        leaf = logits.float().requires_grad_()
        logprobs, entropy = function(leaf)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        return logprobs, entropy, leaf.grad

    def fused(leaf):
        flat = FusedLogprobs.apply(leaf.view(-1, 11), tokens.view(-1), temperature)
        return tuple(values.view(2, 5) for values in flat)

    plain = run(lambda leaf: token_logprobs(leaf, tokens, temperature=temperature))
    for found, expected in zip(run(fused), plain, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pairwise_loss_with_margins():
    """-log sigmoid(2 - 1 - m), by hand for m = 0 and m = 3."""
    chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
    loss = pairwise_loss(chosen, rejected, margins=torch.tensor([0.0, 3.0]))
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert loss.tolist() == pytest.approx(expected)
    assert pairwise_loss(chosen, rejected).tolist() == pytest.approx(expected[:1] * 2)


@pytest.mark.parametrize("smoothing, expected", [(0.0, 0.513015), (0.25, 0.613015)])
def test_dpo_loss_by_hand(smoothing, expected):
    # Rewards 0.1 * (-2 - -5) = 0.3 and 0.1 * (-4 - -3) = -0.1: log(1 + exp(-0.4)) = 0.513015, and
    # a share e of swapped pairs adds e * 0.4.
    chosen = implicit_rewards(torch.tensor([-2.0]), torch.tensor([-5.0]), beta=0.1)
    rejected = implicit_rewards(torch.tensor([-4.0]), torch.tensor([-3.0]), beta=0.1)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.3, -0.1))
    loss = dpo_loss(chosen, rejected, label_smoothing=smoothing)
    assert loss.shape == (1,) and loss.item() == pytest.approx(expected, abs=1e-6)


def test_batches_move_and_select_rows_in_every_tensor():
    ids = torch.arange(6).view(3, 2)
    batch = TextBatch(input_ids=ids, attention_mask=ids + 10, labels=ids + 20)
    some = batch.rows(torch.tensor([2, 0]))
    assert some.input_ids.tolist() == [[4, 5], [0, 1]]
    assert some.attention_mask.tolist() == [[14, 15], [10, 11]]
    assert some.labels.tolist() == [[24, 25], [20, 21]]
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.attention_mask, moved.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert type(moved) is TextBatch
