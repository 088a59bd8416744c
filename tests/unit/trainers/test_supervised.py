"""Objectives of the supervised loop, with a stand-in for the engine."""

import math

import pytest
import torch

from dschat.algorithms.types import PairBatch
from dschat.trainers.supervised import RewardObjective


def test_the_reward_models_loss_takes_the_margins():
    ids = torch.tensor([[5, 6], [7, 8], [5, 9], [7, 4]])
    scores = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
    margins = torch.tensor([3.0, 0.0] * 2)
    batch = PairBatch(ids, torch.ones_like(ids), ids, margins)
    loss, extra = RewardObjective().loss_sum(lambda **_: scores, batch)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2)) + math.log1p(math.exp(-3)))
    assert extra["train/accuracy"].item() == 2
