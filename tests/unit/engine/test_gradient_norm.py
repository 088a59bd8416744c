"""The gradient norm of plain AdamW, fp32 without ZeRO, of which DeepSpeed reports none."""

import math

import pytest
import torch

from dschat.engine import optim
from dschat.engine.optim import GradientCheck, gradient_norm


class PlainEngine:
    """DeepSpeed's engine in fp32 without ZeRO, as far as a step needs it."""

    device = torch.device("cpu")
    micro_steps = global_steps = skipped_steps = global_samples = 0
    _global_grad_norm = None

    def __init__(self, gradients: list[list[float]]):
        self.module = torch.nn.ParameterList(torch.zeros(len(values)) for values in gradients)
        for parameter, values in zip(self.module, gradients, strict=True):
            parameter.grad = torch.tensor(values)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)
        self.zero_optimization_stage = lambda: 0
        self.fp16_enabled = self.bfloat16_enabled = lambda: False
        self.train_batch_size = lambda: 1
        self.get_global_grad_norm = lambda: self._global_grad_norm
        self.zero_grad = self.optimizer.zero_grad
        self.step = self.optimizer.step


@pytest.fixture(params=[1, 3])
def ranks(request, monkeypatch) -> int:
    """Return a number of ranks, which all hold the same gradients."""
    monkeypatch.setattr(optim.dist, "world_size", lambda: request.param)
    monkeypatch.setattr(optim.dist, "all_reduce", lambda tensor: request.param * tensor)
    return request.param


def test_the_norm_is_reported_on_any_number_of_ranks(ranks):
    first, second = PlainEngine([[3.0, 0.0], [4.0]]), PlainEngine([[5.0, 12.0]])
    assert math.isnan(gradient_norm(first))
    check = GradientCheck(first, second, measured=torch.tensor([7.0], dtype=torch.float64))
    check.step()
    assert check.measured == [7.0 * ranks]
    assert [gradient_norm(engine) for engine in (first, second)] == pytest.approx([5.0, 13.0])
    assert first.module[0].tolist() == [-3.0, 0.0]


def test_a_skipped_update_leaves_no_older_norm(ranks):
    engine = PlainEngine([[3.0, 4.0]])
    GradientCheck(engine).step()
    before = engine.module[0].tolist()
    engine.module[0].grad = torch.tensor([math.inf, 1.0])
    GradientCheck(engine).step()
    assert gradient_norm(engine) == math.inf
    assert engine.skipped_steps == 1 and engine.module[0].tolist() == before
