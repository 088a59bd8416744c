"""Compare a split model with the whole one: rounding passes at any depth, faults do not."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dschat.engine.split_check import check_split
from dschat.generation.decoding import TOLERANCE, logit_gap
from dschat.models.structure import decoder_layers

GROUP = SimpleNamespace(size=2, gather=lambda tensor: torch.stack([tensor, tensor]))


class HalvedLinear(nn.Module):
    """A product of two halves that are rounded before they are summed, as two ranks compute it."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.halves = [half.clone() for half in weight.chunk(2, dim=1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.linear(first, self.halves[0]) + F.linear(second, self.halves[1])


def deep_models(layers: int, dtype: torch.dtype):
    """Return a model with random weights, and the same with halved products."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).to(dtype).eval()
    split = copy.deepcopy(whole)
    for layer in decoder_layers(split)[1]:
        layer.self_attn.o_proj = HalvedLinear(layer.self_attn.o_proj.weight.detach())
        layer.mlp.down_proj = HalvedLinear(layer.mlp.down_proj.weight.detach())
    return whole, split


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 128, (3, 90), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(90) >= torch.tensor([[0], [70], [12]])).long()
    return ids * mask, mask


def engine_of(model):
    class Engine:
        module = model
        eval = staticmethod(model.eval)

        def __call__(self, **inputs):
            return model(**inputs)

    return Engine()


@pytest.mark.parametrize("layers, dtype", [(2, torch.float32), (96, torch.bfloat16)])
def test_rounding_passes_and_a_missing_slice_does_not(layers, dtype):
    whole, split = deep_models(layers, dtype)
    with torch.no_grad():
        check_split(engine_of(whole), split, GROUP, *prompts())
        wrong = layers // 2
        decoder_layers(split)[1][wrong].mlp.down_proj.halves[1].zero_()
        with pytest.raises(ValueError, match=f"first in decoder layer {wrong}: .*tp_size 1"):
            check_split(engine_of(whole), split, GROUP, *prompts())


def test_logits_alone_would_refuse_a_right_deep_model():
    whole, split = deep_models(96, torch.bfloat16)
    ids, mask = prompts()
    with torch.no_grad():
        logits = [
            model(input_ids=ids, attention_mask=mask).logits[:, -1] for model in (whole, split)
        ]
    assert logit_gap(*logits) > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_a_wrong_head_and_nan_are_noticed(value):
    whole, split = deep_models(2, torch.float32)
    split.lm_head.weight.data[5] = value
    with torch.no_grad(), pytest.raises(ValueError, match="first in the logits"):
        check_split(engine_of(whole), split, GROUP, *prompts())


def test_an_unsplit_replica_keeps_its_layers():
    whole, split = deep_models(2, torch.float32)
    with torch.no_grad():
        check_split(engine_of(whole), split, GROUP, *prompts())
    layers = [*decoder_layers(whole)[1], *decoder_layers(split)[1]]
    assert not any(layer._forward_hooks for layer in layers), "hooks should be gone"
