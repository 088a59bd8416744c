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


def test_centering_adds_the_squared_sum_of_scores_to_the_training_loss_alone():
    ids = torch.tensor([[5, 6], [7, 8], [5, 9], [7, 4]])
    scores = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
    batch = PairBatch(ids, torch.ones_like(ids), ids, torch.zeros(4))
    engine = StandIn(scores)
    plain = math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))
    centred = RewardObjective(center_rewards_coef=0.1)
    # The pairs' scores are 2 and 1, and 3 and 0: each sums to 3.
    assert centred.loss_sum(engine, batch)[0].item() == pytest.approx(plain + 0.1 * (9 + 9))
    assert RewardObjective().loss_sum(engine, batch)[0].item() == pytest.approx(plain)
    found = centred.evaluate(engine, [batch], num_rows=2)
    assert found["eval/loss"] == pytest.approx(plain / 2)


class StandIn:
    """An engine whose model gives fixed scores."""

    device = torch.device("cpu")

    def __init__(self, scores: torch.Tensor):
        self.scores = scores

    def __call__(self, **_) -> torch.Tensor:
        return self.scores

    def eval(self) -> None:
        """Do without a mode."""
