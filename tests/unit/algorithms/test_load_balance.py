"""The auxiliary loss of routers."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dschat.algorithms.load_balance import load_balance


def test_even_and_one_sided_loads():
    # Four tokens, two experts, one each: two tokens to either, all with probability 1.
    even = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(2, 1)
    loss, load = load_balance([even], torch.ones(4), top_k=1)
    assert loss.item() == pytest.approx(1.0) and load.item() == 1.0
    loss, load = load_balance([even], torch.tensor([1, 0, 1, 0]), top_k=1)
    assert loss.item() == pytest.approx(2.0) and load.item() == 2.0


def test_the_loss_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(12, 5, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    loss, load = load_balance(logits, mask.flatten(), top_k=2)
    expected = load_balancing_loss_func(logits, 5, 2, mask)
    assert torch.allclose(loss, expected, atol=1e-6)
    found = torch.autograd.grad(loss, logits)
    assert all(
        torch.allclose(a, b, atol=1e-7)
        for a, b in zip(found, torch.autograd.grad(expected, logits), strict=True)
    )
    assert 1 < load.item() <= 2.5 and not load.requires_grad
