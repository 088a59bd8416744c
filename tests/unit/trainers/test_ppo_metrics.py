"""Metrics of speed and of the generator, against values computed by hand."""

import pytest
import torch
from torch import nn

from dschat.trainers.ppo_metrics import logprob_gap, rollout_flops


def test_floating_point_operations_of_a_rollout():
    critic = nn.Linear(4, 5, bias=False)
    reward = nn.Linear(3, 1, bias=False)
    # 130 parameters, 100 of them trained.
    actor = nn.Sequential(
        nn.Linear(10, 10, bias=False), nn.Linear(6, 5, bias=False).requires_grad_(False)
    )
    found = rollout_flops(
        generated=[actor],
        scored=[actor, actor, critic, reward],
        trained=[(actor, 3), (critic, 0.5)],
    )
    # Forwards: three of 130 parameters, one of 20 and one of 3. A training pass: a forward, and
    # the gradients of inputs and of trained weights.
    assert found == 2 * (3 * 130 + 20 + 3) + 3 * (4 * 130 + 2 * 100) + 0.5 * (4 * 20 + 2 * 20)


def test_logprob_gap_is_a_mean_over_answer_tokens_of_all_batches():
    mask = torch.tensor([[True, True, False]])
    one = (torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.0, 0.0]]), mask)
    other = (torch.tensor([[-3.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
    assert logprob_gap([one, other]) == {"rollout/logprob_gap": pytest.approx(1.5 / 3)}


def test_a_generator_without_logprobs_has_no_logprob_gap():
    batch = torch.zeros(1, 2)
    assert logprob_gap([(batch, None, batch.bool())]) == {}
