"""Figures of speed and of the generator, by hand."""

import pytest
import torch
from torch import nn

from dschat.trainers.ppo_metrics import logprob_gap, rollout_flops


def test_operations_of_a_rollout():
    actor, critic, reward = (
        nn.Linear(10, 10, bias=False),
        nn.Linear(4, 5, bias=False),
        nn.Linear(3, 1, bias=False),
    )
    half = nn.Sequential(
        actor, nn.Linear(6, 5, bias=False).requires_grad_(False)
    )  # 130 parameters, 100 trained
    found = rollout_flops(
        generated=[half], scored=[half, half, critic, reward], trained=[(half, 3), (critic, 0.5)]
    )
    # Forwards: 130 three times, 20 and 3. A pass: forward and gradients of the inputs, and of the trained weights.
    assert found == 2 * (3 * 130 + 20 + 3) + 3 * (4 * 130 + 2 * 100) + 0.5 * (4 * 20 + 2 * 20)


def test_the_gap_is_a_mean_over_answer_tokens_of_all_batches():
    mask = torch.tensor([[True, True, False]])
    one = (torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.0, 0.0]]), mask)
    other = (torch.tensor([[-3.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
    assert logprob_gap([one, other]) == {"rollout/logprob_gap": pytest.approx(1.5 / 3)}


def test_a_generator_that_tells_no_logprobs_has_no_gap():
    batch = torch.zeros(1, 2)
    assert logprob_gap([(batch, None, batch.bool())]) == {}
