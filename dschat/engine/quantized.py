"""Frozen linear layers in int8, which DeepSpeed-Chat calls mixed-precision ZeRO++ (MixZ++).

They halve the memory of all that LoRA does not train, and under ZeRO-3 the traffic of gathering.

DeepSpeed's zero_quantized_nontrainable_weights refuses bf16 and, as of 0.19.8, fails in the second
step if parameters are fetched ahead. Here a weight is an ordinary int8 parameter without gradient.
ZeRO-3 partitions and gathers it as it is, and no engine converts it to the training precision.
"""

from collections.abc import Iterable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.engine.zero import gathered, is_partitioned

LARGEST_GROUP = 128  # weights of a row that share a scale; its 4 bytes then cost 3%
LEVELS = 127  # symmetric: -128 is not used


def group_size(in_features: int) -> int:
    """Return the largest divisor of `in_features` that is at most LARGEST_GROUP."""
    return max(size for size in range(1, LARGEST_GROUP + 1) if in_features % size == 0)


def quantize(weight: torch.Tensor) -> torch.Tensor:
    """Pack a weight [out, in] into int8 [out, in + 4 * groups].

    A row holds its values, then the fp32 scales of its groups as bytes. A group's largest magnitude
    becomes 127, so no weight is off by more than half its scale (round to nearest; Dettmers et al.
    2022, LLM.int8(), equation 2, with groups of a row instead of rows).
    """
    groups = weight.detach().float().unflatten(1, (-1, group_size(weight.shape[1])))
    scales = groups.abs().amax(-1) / LEVELS
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    values = (groups / divisors).round_().clamp_(-LEVELS, LEVELS).to(torch.int8).flatten(1)
    return torch.cat([values, scales.view(torch.int8)], dim=1)


def dequantize(packed: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the [out, in] weight that `quantize` packed, each value rounded once, to `dtype`."""
    size = group_size(in_features)
    values = packed[:, :in_features].unflatten(1, (-1, size))
    # The copy is aligned, which the bytes after the values need not be.
    scales = (
        packed[:, in_features:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    )
    weight = torch.empty(
        packed.shape[0], in_features // size, size, dtype=dtype, device=packed.device
    )
    torch.mul(values, scales[..., None], out=weight)
    return weight.flatten(1)


class _Linear(torch.autograd.Function):
    """x W^T + b, without gradient of W. W in full precision lives only while it is multiplied."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, packed: torch.Tensor, bias: Optional[torch.Tensor], in_features: int
    ) -> torch.Tensor:
        # Save the parameter, not its data: ZeRO-3 frees the data and gathers it again for backward.
        ctx.save_for_backward(packed)
        ctx.in_features = in_features
        return F.linear(x, dequantize(packed, in_features, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (packed,) = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        return (
            gradient @ dequantize(packed, ctx.in_features, gradient.dtype) if needs_x else None,
            None,
            gradient.flatten(0, -2).sum(0) if needs_bias else None,
            None,
        )


class QuantizedLinear(nn.Module):
    """An nn.Linear or Conv1D whose frozen weight is stored in int8."""

    def __init__(
        self,
        packed: torch.Tensor,
        bias: Optional[nn.Parameter],
        *,
        like: nn.Module,
        dtype: torch.dtype,
    ):
        """
        Args:
            packed: the weight [out, in] as packed by ``quantize``.
            bias: the layer's own, which may train.
            like: the layer that this one replaces.
            dtype: the dtype of the weight before quantization.
        """
        super().__init__()
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
        return _Linear.apply(x, self.packed, self.bias, self.in_features)

    def dequantized_weight(self, packed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the weight in the replaced layer's layout and the training precision.

        The shape is [out, in], or [in, out] for Conv1D.

        Args:
            packed: the whole packed weight, if it is not this layer's parameter itself. Under
                ZeRO-3 the parameter has to be gathered first.
        """
        packed = self.packed if packed is None else packed
        weight = dequantize(packed.detach(), self.in_features, self.dtype)
        return weight.t().contiguous() if self.is_conv1d else weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def quantize_linears(model: nn.Module, names: Iterable[str]) -> int:
    """Replace each named nn.Linear or Conv1D by a QuantizedLinear.

    If ZeRO-3 partitions the weight, the int8 weight is partitioned too. Every rank must call it,
    before the engine is built.

    Returns:
        The number of layers.
    """
    names = list(names)
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight
        with gathered([weight]), torch.no_grad():
            packed = quantize(weight.t() if isinstance(linear, Conv1D) else weight)
        layer = QuantizedLinear(packed, linear.bias, like=linear, dtype=weight.dtype)
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
