"""Tensor-parallel generation: neighbouring ranks each hold a slice of every decoder layer.

They generate one batch together, by Megatron's scheme (Shoeybi et al. 2019, section 3). Linear
layers that read the hidden state are split by outputs ("colwise"), those that write to it by inputs
("rowwise"); the partial results of the latter are summed, twice a layer. Each attention head and
each column of the feed-forward part is on one rank. Embeddings, norms and the head are whole on
all ranks.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from dschat.models.structure import decoder_layers

# By transformers' model_type, for families whose configuration has no plan.
PLANS = {
    "opt": {
        **{f"layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.fc1": "colwise",
        "layers.*.fc2": "rowwise",
    }
}
LAYER = "layers.*."
# Styles that do not split the forward pass; only their gradients differ.
WHOLE = ("replicated_with_grad_allreduce",)
HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_heads",
    "n_head",
)


def split_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Return the style, "colwise" or "rowwise", of each linear layer inside a decoder layer.

    The plan is PLANS' or transformers'. It is empty if there is no plan, or if the plan has other
    styles (packed matrices, experts).
    """
    text = config.get_text_config()
    plan = PLANS.get(text.model_type) or getattr(text, "base_model_tp_plan", None) or {}
    inside = {name.partition(LAYER)[2]: style for name, style in plan.items() if LAYER in name}
    split = {name: style for name, style in inside.items() if style not in WHOLE}
    return split if set(split.values()) == {"colwise", "rowwise"} else {}


def split_problems(config: PreTrainedConfig, size: int, *, world_size: int) -> list[str]:
    """Return the reasons why groups of `size` ranks cannot generate with a model.

    Args:
        config: the model's configuration.
        size: ranks of a group; 1 has no problems.
        world_size: ranks of the run.

    Returns:
        One sentence for each reason.
    """
    flag = f"--inference_tp_size {size}"
    found: list[str] = []
    if size == 1:
        return found
    if world_size % size:
        found.append(
            f"{flag} does not divide the {world_size} process(es) of this run: "
            f"give a divisor of {world_size}."
        )
    text = config.get_text_config()
    if not split_plan(config):
        found.append(
            f"{flag}: how to split a model of type {text.model_type} is not known: "
            "give --inference_tp_size 1."
        )
        return found
    heads = text.num_attention_heads
    counts = {
        "attention heads": heads,
        "key-value heads": getattr(text, "num_key_value_heads", None) or heads,
        "feed-forward columns": getattr(text, "intermediate_size", None)
        or getattr(text, "ffn_dim", None)
        or size,
    }
    for what, count in counts.items():
        if not isinstance(count, int):  # a list, with a number for each layer
            count = math.gcd(*count)
        if count % size:
            found.append(
                f"{flag} does not divide the model's {count} {what}: "
                f"give a divisor of {count}, or 1."
            )
    return found


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that generate together: `size` neighbours, of which this one is number `index`."""

    size: int
    index: int
    first: int  # the global rank of number 0
    handle: dist.ProcessGroup

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the group in place."""
        dist.all_reduce(tensor, group=self.handle)
        return tensor

    def agree(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` as number 0 of the group has it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=self.first, group=self.handle)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, stacked to [size, ...]; they must have one shape."""
        flat = tensor.contiguous().view(-1)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(parts, flat, group=self.handle)
        return torch.stack(parts).view(self.size, *tensor.shape)

    def slice(self, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Return this rank's part along `dim`, or all of it if that is None."""
        if dim is None:
            return tensor
        assert tensor.shape[dim] % self.size == 0, (
            f"{self.size} does not divide dimension {dim} of {tuple(tensor.shape)}"
        )
        return tensor.chunk(self.size, dim)[self.index]


@functools.lru_cache
def tensor_group(size: int) -> TensorGroup | None:
    """Return this rank's group, or None if `size` is 1.

    Every rank must call it, and `size` must divide the number of ranks.
    """
    if size == 1:
        return None
    # Each rank has to make all groups, in the same order.
    handles = [
        dist.new_group(range(first, first + size))
        for first in range(0, dist.get_world_size(), size)
    ]
    number, index = divmod(dist.get_rank(), size)
    return TensorGroup(size, index, number * size, handles[number])


class RowwiseLinear(nn.Linear):
    """An nn.Linear whose weight is a slice of the columns, for the same slice of the input."""

    group: TensorGroup

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in / size] to [..., out], the same on all ranks."""
        out = self.group.sum_(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias  # once, not once a rank


def split_layers(model: nn.Module, group: TensorGroup) -> dict[tuple[nn.Module, str], int]:
    """Cut the decoder layers of a model on the meta device to those of one rank.

    Returns:
        The dimension that was cut, by (module, name of its parameter).
    """
    plan, cut = split_plan(model.config), {}
    _, layers = decoder_layers(model)
    for layer in layers:
        parents = set()
        for name, style in plan.items():
            linear = layer.get_submodule(name)
            assert type(linear) is nn.Linear, f"{name} is a {type(linear).__name__}"
            parents.add(layer.get_submodule(name.rpartition(".")[0]))
            cut[linear, "weight"] = 0 if style == "colwise" else 1
            if style == "rowwise":
                linear.in_features //= group.size
                linear.__class__, linear.group = RowwiseLinear, group
                continue
            linear.out_features //= group.size
            if linear.bias is not None:
                cut[linear, "bias"] = 0
        for parent in parents:
            for count in set(HEAD_COUNTS) & set(vars(parent)):
                setattr(parent, count, getattr(parent, count) // group.size)
    for (linear, leaf), dim in cut.items():
        part = group.slice(linear._parameters[leaf], dim)
        linear._parameters[leaf] = nn.Parameter(torch.empty_like(part), requires_grad=False)
    return cut


def gather_prompts(
    group: TensorGroup, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompts of the whole group and their masks, [size * B, longest P].

    Args:
        group: the ranks that generate together.
        input_ids, attention_mask: [B, P] of this rank, padded on the left; B must be the same on
            all ranks of the group.
    """
    shapes = group.gather(torch.tensor(input_ids.shape, device=input_ids.device)).tolist()
    rows, longest = {shape[0] for shape in shapes}, max(shape[1] for shape in shapes)
    if len(rows) > 1:
        raise ValueError(
            f"ranks that generate together have different numbers of prompts: "
            f"{[shape[0] for shape in shapes]}"
        )
    missing = longest - input_ids.shape[1]
    # Pad with a token that the row contains anyway, so that a repetition penalty does not change.
    input_ids = torch.cat([input_ids[:, -1:].expand(-1, missing), input_ids], dim=-1)
    attention_mask = F.pad(attention_mask, (missing, 0))
    return group.gather(input_ids).flatten(0, 1), group.gather(attention_mask).flatten(0, 1)
