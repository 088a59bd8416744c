"""Frozen linear layers in int8 or in 4 bits (NF4), for what LoRA adapts and nothing trains.

int8 is what DeepSpeed-Chat calls mixed-precision ZeRO++ (MixZ++). The formats take a half and a
quarter of the memory of half precision, and under ZeRO-3 of the traffic of gathering.

DeepSpeed's zero_quantized_nontrainable_weights refuses bf16 and, as of 0.19.8, fails in the second
step if parameters are fetched ahead. Here a weight is an ordinary int8 parameter without gradient.
ZeRO-3 partitions and gathers it as it is, and no engine converts it to the training precision.
"""

import functools
from collections.abc import Iterable
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.engine.zero import gathered, is_partitioned

Format = Literal["int8", "nf4"]

# The most weights of a row that share a scale. It costs 4 bytes with int8 and 2 with nf4: 3 and 6%.
LARGEST_GROUP = {"int8": 128, "nf4": 64}
SCALE_DTYPE = {"int8": torch.float32, "nf4": torch.bfloat16}
LEVELS = 127  # of int8, symmetric: -128 is not used
CHUNK = 2**24  # NF4 weights that are looked up at a time, with 6 bytes of buffers for each
# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], one of them 0
# (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def group_size(in_features: int, kind: Format) -> int:
    """Return the largest divisor of `in_features` that is at most LARGEST_GROUP."""
    most = LARGEST_GROUP[kind]
    return max(size for size in range(1, most + 1) if in_features % size == 0)


def packed_columns(in_features: int, kind: Format) -> int:
    """Return the bytes of a packed row of `in_features` weights: its values, then its scales."""
    groups = in_features // group_size(in_features, kind)
    return _value_bytes(in_features, kind) + groups * SCALE_DTYPE[kind].itemsize


def _value_bytes(in_features: int, kind: Format) -> int:
    return in_features if kind == "int8" else -(-in_features // 2)


def quantize(weight: torch.Tensor, kind: Format) -> torch.Tensor:
    """Pack a weight [out, in] into int8 [out, ``packed_columns``].

    A row holds its values, then the scales of its groups as bytes, so that any split of rows is
    whole.

    - int8: a group's largest magnitude becomes 127, so no weight is off by more than half its scale
      (round to nearest; Dettmers et al. 2022, LLM.int8(), equation 2, with groups of a row instead
      of rows).
    - nf4: a group's largest magnitude becomes 1, and each weight the nearest of the 16 values. Two
      weights share a byte, the first in its high half.
    """
    groups = weight.detach().float().unflatten(1, (-1, group_size(weight.shape[1], kind)))
    largest = groups.abs().amax(-1)
    scales = (largest / LEVELS if kind == "int8" else largest).to(SCALE_DTYPE[kind])
    divisors = torch.where(scales == 0, 1.0, scales.float())[..., None]
    scaled = (groups / divisors).flatten(1)
    values = _to_int8(scaled) if kind == "int8" else _to_nf4(scaled)
    return torch.cat([values, scales.contiguous().view(torch.int8)], dim=1)


def _to_int8(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def _to_nf4(scaled: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the nearest NF4 values of [out, in], two in a byte."""
    values = torch.tensor(NF4, device=scaled.device)
    borders = (values[1:] + values[:-1]) / 2
    numbers = torch.bucketize(scaled.contiguous(), borders).to(torch.uint8)
    numbers = F.pad(numbers, (0, numbers.shape[1] % 2))
    return ((numbers[:, ::2] << 4) | numbers[:, 1::2]).view(torch.int8)


def dequantize(
    packed: torch.Tensor, in_features: int, dtype: torch.dtype, kind: Format
) -> torch.Tensor:
    """Return the [out, in] weight that `quantize` packed, each value rounded once, to `dtype`."""
    size = group_size(in_features, kind)
    end = _value_bytes(in_features, kind)
    # The copy is aligned, which the bytes after the values need not be.
    scales = packed[:, end:].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE[kind])
    weight = torch.empty(
        packed.shape[0], in_features // size, size, dtype=dtype, device=packed.device
    )
    rows = len(packed) if kind == "int8" else max(1, CHUNK // in_features)
    for part in range(0, len(packed), rows):
        chunk = slice(part, part + rows)
        values = packed[chunk, :end]
        if kind == "nf4":
            values = _nf4_values(values)[:, :in_features]
        torch.mul(values.unflatten(1, (-1, size)), scales[chunk, :, None], out=weight[chunk])
    return weight.flatten(1)


def _nf4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the NF4 values [n, 2 * c] fp32 of bytes [n, c], by one lookup for both of a byte."""
    numbers = packed.reshape(-1).view(torch.uint8).int()
    return _nf4_pairs(packed.device).index_select(0, numbers).view(len(packed), -1)


@functools.lru_cache
def _nf4_pairs(device: torch.device) -> torch.Tensor:
    """Return the NF4 values of the high and the low half of each byte, [256, 2] fp32."""
    byte = torch.arange(256, device=device)
    return torch.tensor(NF4, device=device)[torch.stack([byte >> 4, byte & 15], dim=-1)]


class _Linear(torch.autograd.Function):
    """x W^T + b, without gradient of W. W in full precision lives only while it is multiplied."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: Optional[torch.Tensor],
        in_features: int,
        kind: Format,
    ) -> torch.Tensor:
        # Save the parameter, not its data: ZeRO-3 frees the data and gathers it again for backward.
        ctx.save_for_backward(packed)
        ctx.in_features = in_features
        ctx.kind = kind
        return F.linear(x, dequantize(packed, in_features, x.dtype, kind), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (packed,) = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        of_x = None
        if needs_x:
            of_x = gradient @ dequantize(packed, ctx.in_features, gradient.dtype, ctx.kind)
        of_bias = gradient.flatten(0, -2).sum(0) if needs_bias else None
        return of_x, None, of_bias, None, None


class QuantizedLinear(nn.Module):
    """An nn.Linear or Conv1D whose frozen weight is stored in int8 or NF4."""

    def __init__(
        self,
        packed: torch.Tensor,
        bias: Optional[nn.Parameter],
        *,
        like: nn.Module,
        dtype: torch.dtype,
        kind: Format,
    ):
        """
        Args:
            packed: the weight [out, in] as packed by ``quantize``.
            bias: the layer's own, which may train.
            like: the layer that this one replaces.
            dtype: the dtype of the weight before quantization.
            kind: the format of `packed`.
        """
        super().__init__()
        self.kind = kind
        self.is_conv1d = isinstance(like, Conv1D)
        self.in_features = like.nx if self.is_conv1d else like.in_features
        self.out_features = like.nf if self.is_conv1d else like.out_features
        self.dtype = dtype
        self.packed = nn.Parameter(packed, requires_grad=False)
        shape = (self.out_features, self.in_features)
        self.packed.dense_shape = torch.Size(reversed(shape) if self.is_conv1d else shape)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        return _Linear.apply(x, self.packed, self.bias, self.in_features, self.kind)

    def dequantized_weight(self, packed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the weight in the replaced layer's layout and the training precision.

        The shape is [out, in], or [in, out] for Conv1D.

        Args:
            packed: the whole packed weight, if it is not this layer's parameter itself. Under
                ZeRO-3 the parameter has to be gathered first.
        """
        packed = self.packed if packed is None else packed
        weight = dequantize(packed.detach(), self.in_features, self.dtype, self.kind)
        return weight.t().contiguous() if self.is_conv1d else weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kind={self.kind}"
        )


def quantize_linears(model: nn.Module, names: Iterable[str], kind: Format) -> int:
    """Replace each named nn.Linear or Conv1D by a QuantizedLinear.

    If ZeRO-3 partitions the weight, the packed weight is partitioned too. Every rank must call it,
    before the engine is built.

    Args:
        model: holds the layers.
        names: their full names.
        kind: the format.

    Returns:
        The number of layers.
    """
    names = list(names)
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight
        with gathered([weight]), torch.no_grad():
            packed = quantize(weight.t() if isinstance(linear, Conv1D) else weight, kind)
        layer = QuantizedLinear(packed, linear.bias, like=linear, dtype=weight.dtype, kind=kind)
        if is_partitioned(weight):
            weight.convert_to_zero_parameters(param_list=[layer.packed])
            # ZeRO's methods on a parameter form a cycle that keeps it alive: free its piece now.
            weight.ds_tensor.data = weight.ds_tensor.new_empty(0)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return len(names)


def dequantized_state_dict(
    model: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `tensors` with all quantized weights in the training precision.

    `tensors` are whole, under the names of `model`.state_dict(). The returned weights are those
    that the layers computed with: rounded, so not the ones that training began from.
    """
    found = dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{name}.weight"] = module.dequantized_weight(found.pop(f"{name}.packed"))
    return found


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, whole, in their stored dtypes."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
