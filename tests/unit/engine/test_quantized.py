"""Linear layers in int8 and NF4, in one process: errors, gradients, sizes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dschat.engine import quantized
from dschat.engine.quantized import (
    NF4,
    QuantizedLinear,
    dequantize,
    dequantized_state_dict,
    group_size,
    packed_columns,
    quantize,
    quantize_linears,
    weight_bytes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of them of zeros, as are the last columns of another."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    found[1], found[2, columns // 2 :] = 0, 0
    return found.to(dtype)


@pytest.mark.parametrize(
    "columns, size", [(64, 64), (128, 128), (576, 96), (4096, 128), (11008, 128), (130, 65)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_off_by_more_than_half_a_step_of_its_group(columns, size, dtype):
    weight = weights(8, columns, dtype)
    assert group_size(columns, "int8") == size
    packed = quantize(weight, "int8")
    width = columns + 4 * columns // size
    assert packed.dtype == torch.int8 and packed.shape == (8, width)
    assert packed_columns(columns, "int8") == width
    found = dequantize(packed, columns, torch.float32, "int8")
    groups = weight.float().unflatten(1, (-1, size))
    half_step = groups.abs().amax(-1, keepdim=True) / 127 / 2
    error = (found.unflatten(1, (-1, size)) - groups).abs()
    assert (error <= half_step * (1 + 1e-5)).all()
    # A group's largest weight is kept, and zeros are zeros.
    assert torch.allclose(
        found.unflatten(1, (-1, size)).abs().amax(-1), groups.abs().amax(-1), rtol=1e-6
    )
    assert not found[1].any() and error.max() > 0
    # In the precision of training each is rounded once more.
    assert torch.equal(dequantize(packed, columns, dtype, "int8"), found.to(dtype))


@pytest.mark.parametrize(
    "columns, size", [(64, 64), (576, 64), (4096, 64), (130, 26), (63, 63), (11008, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_becomes_the_nearest_nf4_value_of_its_group(columns, size, dtype):
    weight = weights(8, columns, dtype)
    assert group_size(columns, "nf4") == size
    packed = quantize(weight, "nf4")
    width = -(-columns // 2) + 2 * columns // size
    assert packed.dtype == torch.int8 and packed.shape == (8, width)
    assert packed_columns(columns, "nf4") == width
    groups = weight.float().unflatten(1, (-1, size))
    scales = groups.abs().amax(-1, keepdim=True).bfloat16().float()
    values = scales[..., None] * torch.tensor(NF4)
    nearest = (groups[..., None] - values).abs().amin(-1)
    found = dequantize(packed, columns, torch.float32, "nf4").unflatten(1, (-1, size))
    assert torch.allclose((found - groups).abs(), nearest, rtol=1e-5, atol=1e-9)
    assert not found[1].any() and nearest.max() > 0
    assert torch.equal(
        dequantize(packed, columns, dtype, "nf4").unflatten(1, (-1, size)), found.to(dtype)
    )


def test_nf4_is_that_of_the_paper():
    """Quantiles of a normal distribution (QLoRA, appendix E), 8 on one side and 9 on the other."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    right = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    left = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([left, torch.zeros(1), right]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4), atol=1e-4)


def test_lookups_in_chunks_are_those_of_the_whole(monkeypatch):
    packed = quantize(weights(9, 130), "nf4")
    whole = dequantize(packed, 130, torch.float32, "nf4")
    monkeypatch.setattr(quantized, "CHUNK", 300)
    assert torch.equal(dequantize(packed, 130, torch.float32, "nf4"), whole)


def make_layer(kind: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = {
        "linear": nn.Linear(48, 24),
        "no bias": nn.Linear(48, 24, bias=False),
        "conv1d": Conv1D(24, 48),
    }[kind]
    return layer.to(dtype)


@pytest.mark.parametrize("stored", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_a_dense_layer_of_the_same_values(kind, dtype, stored):
    model = nn.ModuleDict({"layer": make_layer(kind, dtype)})
    bias = model["layer"].bias
    assert quantize_linears(model, ["layer"], stored) == 1
    layer = model["layer"]
    dense = layer.dequantized_weight()
    assert isinstance(layer, QuantizedLinear) and layer.bias is bias
    assert dense.dtype == dtype and dense.shape == make_layer(kind).weight.shape
    x = torch.randn(2, 5, 48).to(dtype).requires_grad_(True)
    layer(x).square().sum().backward()
    found = [x.grad, None if bias is None else bias.grad.clone()]
    x.grad = None
    other_bias = None if bias is None else bias.detach().clone().requires_grad_(True)
    F.linear(x, dense.t() if kind == "conv1d" else dense, other_bias).square().sum().backward()
    expected = [x.grad, None if bias is None else other_bias.grad]
    for a, b in zip(found, expected):
        if (
            kind == "conv1d" and b is not None
        ):  # of another layout, which another kernel may multiply
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-5 if dtype == torch.float32 else 2e-2,
                atol=1e-5 if dtype == torch.float32 else 1e-2,
            )
        else:
            assert torch.equal(a, b) if b is not None else a is None
    assert layer.packed.grad is None and not layer.packed.requires_grad and found[0].abs().max() > 0


def test_a_converted_model_keeps_its_int8():
    model = nn.Sequential(make_layer("linear"))
    quantize_linears(model, ["0"], "int8")
    model.to(torch.bfloat16)
    assert model[0].packed.dtype == torch.int8 and model[0].packed.dense_shape == (24, 48)
    x = torch.randn(3, 48).bfloat16()
    assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_saved_weights_have_their_old_name_shape_and_precision(kind):
    model = nn.ModuleDict({"layer": make_layer(kind, torch.bfloat16), "other": nn.Linear(2, 2)})
    names, before = set(model.state_dict()), model["layer"].weight.detach().clone()
    quantize_linears(model, ["layer"], "int8")
    state = model.state_dict()
    found = dequantized_state_dict(model, state)
    assert set(found) == names and set(state) == names - {"layer.weight"} | {"layer.packed"}
    assert (
        found["layer.weight"].dtype == torch.bfloat16
        and found["layer.weight"].shape == before.shape
    )
    assert torch.allclose(
        found["layer.weight"].float(), before.float(), atol=before.abs().max().item() / 127
    )
    assert not torch.equal(found["layer.weight"], before)


@pytest.mark.parametrize("kind, times", [("int8", 1.9), ("nf4", 3.7)])
def test_half_precision_layers_of_usual_widths_shrink(kind, times):
    for width in (2048, 4096, 5120, 7168):
        model = nn.Sequential(nn.Linear(width, 8, bias=False)).bfloat16()
        before = weight_bytes(model)
        quantize_linears(model, ["0"], kind)
        assert times * weight_bytes(model) < before == 2 * 8 * width
