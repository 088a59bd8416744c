"""Losses of preference pairs, and small deviations, by hand."""

import math

import pytest
import torch

from dschat.algorithms.losses import hinge_loss, ipo_loss, robust_dpo_loss
from dschat.algorithms.masks import mean_and_std, moments


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_robust_dpo_by_hand():
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.25])
    found = robust_dpo_loss(chosen, rejected, label_smoothing=0.1)
    for loss, margin in zip(found.tolist(), (0.5, -0.75), strict=True):
        biased = -0.9 * log_sigmoid(margin) + 0.1 * log_sigmoid(-margin)
        assert loss == pytest.approx(biased / 0.8, rel=1e-6)
    plain = robust_dpo_loss(chosen, rejected, label_smoothing=0.0)
    assert plain.tolist() == pytest.approx([-log_sigmoid(0.5), -log_sigmoid(-0.75)], rel=1e-6)


def test_hinge_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.5, 0.0]), torch.tensor([0.5, 0.25, 1.0])
    assert hinge_loss(chosen, rejected).tolist() == [0.0, 0.75, 2.0]


def test_ipo_by_hand():
    # The difference that beta 0.1 asks for is 1 / 0.2 = 5.
    found = ipo_loss(torch.tensor([1.0, 6.0]), torch.tensor([0.25, 0.5]), beta=0.1)
    assert found.tolist() == pytest.approx([4.25**2, 0.5**2], rel=1e-6)


def test_a_deviation_below_one():
    mean, deviation = mean_and_std(moments(torch.tensor([[1.0, 1.5]]), torch.ones(1, 2)))
    assert (mean.item(), deviation.item()) == (1.25, 0.25)
