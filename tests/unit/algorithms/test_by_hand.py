"""Small cases of the mathematics that are computed by hand."""

import math

import pytest
import torch

from dschat.algorithms.advantages import batch_scaled, equal_groups, gae, overlong_penalty
from dschat.algorithms.grouping import group_by_length, padded_tokens
from dschat.algorithms.importance import importance_weights
from dschat.algorithms.losses import aggregation_weights, explained_variance, value_loss
from dschat.algorithms.masks import masked_whiten
from dschat.algorithms.repetition import repeated_share


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def test_groups_are_equal_if_all_their_scores_are():
    scores = torch.tensor([1.0, 1, 2, 2, 3, 2, 4, 4, 4])
    assert equal_groups(scores, 3).tolist() == [False, False, True]


def test_the_overlong_penalty_rises_to_its_full_size():
    lengths = torch.tensor([5, 6, 8, 10, 12])
    found = overlong_penalty(lengths, max_length=10, buffer=4, penalty=3.0)
    assert found.tolist() == [0, 0, 1.5, 3, 3]
    assert overlong_penalty(lengths, max_length=10, buffer=0, penalty=3.0).tolist() == [0] * 5


def test_rewards_and_values_after_an_answer_do_not_enter_its_advantages():
    mask = rows([1, 1, 0])
    advantages, returns = gae(rows([1.0, 2, 50]), rows([0.5, 0.25, 70]), mask, gamma=1.0, lam=0.5)
    # Last: 2 - 0.25. First: 1 + 0.25 - 0.5, and half of the one after it.
    assert advantages.tolist() == [[0.75 + 0.875, 1.75, 0]]
    assert returns.tolist() == [[2.125, 2, 0]]


def test_advantages_are_divided_by_the_deviation_of_the_answers_rewards():
    totals = torch.tensor([3.0, 6, 20], dtype=torch.float64)  # variance (20 - 12) / 2 = 4
    assert batch_scaled(rows([2.0, -4]), totals)[0].tolist() == pytest.approx([1, -2], abs=1e-3)


def test_whitening_gives_mean_0_and_deviation_1():
    found = masked_whiten(rows([1.0, 3, 5, 99]), rows([True, True, True, False]))
    assert found[0, 3] == 0
    live = found[0, :3]
    assert live[1].item() == pytest.approx(0, abs=1e-6)
    assert live[2].item() == pytest.approx(-live[0].item())
    assert live[2].item() in (pytest.approx(1.0), pytest.approx(1.5**0.5))


def test_groups_of_like_length_keep_to_their_tokens():
    assert padded_tokens([0, 2], [3, 9, 5]) == 10
    lengths = [4, 2, 2, 1, 9]
    assert group_by_length(lengths, tokens=8) == [[4], [0, 1], [2, 3]]
    assert group_by_length(lengths, tokens=8, least=4) == [[4], [0], [1], [2, 3]]
    assert group_by_length([1, 1, 1], tokens=9) == [[0, 1, 2]]


@pytest.mark.parametrize(
    "correction, expected", [("truncate", [0.25, 0.5, 1, 2, 2]), ("mask", [0, 0.5, 1, 2, 0])]
)
def test_importance_weights_at_and_beyond_the_cap(correction, expected):
    ratios = rows([0.25, 0.5, 1, 2, 4.0])
    weights, stats = importance_weights(
        ratios.log(),
        torch.zeros(1, 5),
        torch.ones(1, 5),
        correction=correction,
        level="token",
        cap=2.0,
    )
    assert weights[0].tolist() == pytest.approx(expected)
    assert stats["bounded"] == sum(a != b for a, b in zip(expected, [0.25, 0.5, 1, 2, 4]))
    assert stats["max"] == pytest.approx(4.0)


def test_tokens_after_an_answer_are_not_the_largest_ratio():
    weights, stats = importance_weights(
        rows([math.log(0.5), 9.0]), torch.zeros(1, 2), rows([True, False]),
        correction="truncate", level="token", cap=2.0,
    )  # fmt: skip
    assert weights.tolist() == [[0.5, 1]] and stats["max"] == pytest.approx(0.5)


def test_the_value_loss_takes_the_larger_error():
    # Moved by 3, at most 1 counts: the errors are 1 and 9; and 1 and 1, which is not clipped.
    loss, stats = value_loss(
        rows([3.0, 1.0]), rows([0.0, 0]), rows([4.0, 0]), rows([1, 1]), cliprange_value=1.0
    )
    assert loss == 0.5 * (9 + 1) and stats["clipped"] == 1


def test_explained_variance():
    # Returns 1 and 3 (variance 1); errors 0.5 and 1.5 (variance 0.25).
    totals = torch.tensor([2.0, 4, 10, 2, 2.5], dtype=torch.float64)
    assert explained_variance(totals) == pytest.approx(0.75)
    constant = torch.tensor([2.0, 4, 8, 2, 2.5], dtype=torch.float64)
    assert math.isnan(explained_variance(constant))
    small = torch.tensor([2.0, 0, 0.5, 0, 0.5], dtype=torch.float64)  # variance below 1
    assert explained_variance(small) == pytest.approx(0)


def test_rows_weigh_by_their_lengths_only_in_the_mean_of_means():
    mask = rows([1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0])
    assert aggregation_weights(mask, "sequence").tolist() == [[0.25], [0.5], [1]]
    assert aggregation_weights(mask, "token") is None


def test_repeated_share_counts_earlier_n_grams():
    tokens = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [7, 7, 7, 7, 7]])
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    # 12 21 12 21; all distinct; 77 77; too short.
    assert repeated_share(tokens, mask, ngram=2).tolist() == [0.5, 0, 0.5, 0]
    assert repeated_share(tokens[:, :1], mask[:, :1], ngram=2).tolist() == [0] * 4
    whole = repeated_share(tokens[2:3, :2], mask[2:3, :2], ngram=2)
    assert whole.tolist() == [0]
