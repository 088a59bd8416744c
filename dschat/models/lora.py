"""LoRA adapters (Hu et al. 2021), injected by PEFT so that the model keeps its class and its names.

A wrapped layer NAME keeps its weight W as NAME.base_layer.weight. It adds
NAME.lora_A.default.weight (A) and NAME.lora_B.default.weight (B). Its output is W x + s B A x with
s = alpha / dim. B starts at zero.

Experts are stacked in parameters of three dimensions. PEFT wraps their module NAME once for each
parameter, and adds s B A to it in the forward pass, for every expert its own A and B. The parameter
is then NAME.base_layer.base_layer.gate_up_proj, for example.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.models.new_tokens import CHILD, merge_new_tokens, new_token_modules
from dschat.models.structure import (
    SCORE_HEAD,
    decoder_layers,
    expert_names,
    linear_names,
    pretrained,
)
from dschat.models.weights import first_names
from dschat.runtime.log import logger

ADAPTER = "default"  # PEFT's name for an adapter
ALL_LINEAR = "all-linear"  # PEFT's name for all linear layers


def add_lora(
    model: nn.Module,
    *,
    dim: int,
    alpha: float,
    module_name: Optional[str] = None,
    target_modules: Sequence[str] = (),
    only_optimize_lora: bool,
    experts: bool = True,
    dropout: float = 0.0,
    use_rslora: bool = False,
    prefix: str = "--",
) -> int:
    """Add LoRA adapters to the decoder's linear layers and experts, in place.

    The head, the embeddings and the routers of experts get none.

    Adapters take the dtype of their weights, since ZeRO-3 wants one dtype throughout.

    With `only_optimize_lora`, the adapters and the score head train. Without it, everything but the
    adapted weights trains: embeddings, norms, biases and heads, as in DeepSpeed-Chat. Parameters
    that were frozen before stay frozen.

    Args:
        model: a causal language model or RewardModel, without adapters.
        dim: rank of the adapters.
        alpha: the update is multiplied by alpha / dim.
        module_name: see ``lora_targets``.
        target_modules: see ``lora_targets``.
        only_optimize_lora: freeze everything but the adapters and the score head.
        experts: adapt the parameters in which experts are stacked, too.
        dropout: probability of dropout on the input of A.
        use_rslora: multiply by alpha / sqrt(dim) instead (Kalajdzievski 2023, rsLoRA).
        prefix: of the command-line flags, for messages.

    Returns:
        The number of adapted layers, and of adapted parameters of experts.

    Raises:
        ValueError: a name matches no layer; the message lists names that exist. Or `dim` is larger
            than every adapted matrix.
    """
    inner = pretrained(model)
    targets = lora_targets(inner, module_name, target_modules, experts=experts, prefix=prefix)
    linears = [inner.get_submodule(name) for name in targets.layers]
    sides = [max(_shape(linear.weight)) for linear in linears]
    sides += [max(_shape(inner.get_parameter(name))[1:]) for name in targets.experts]
    _check_rank(dim, max(sides), flag=f"{prefix}lora_dim")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    path, layers = decoder_layers(inner)
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=[name.removeprefix(f"{path}.") for name in targets.layers],
        target_parameters=[name.removeprefix(f"{path}.") for name in targets.experts] or None,
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears),
    )
    # Into the layers alone, which have no configuration: by a model's type, PEFT would replace the
    # targets of some mixtures of experts and refuse those of recurrent models.
    inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    adapted = lora_layers(inner)
    names = {adapted_name(name, layer) for name, layer in adapted.items()}
    expected = {f"{name}.weight" for name in targets.layers} | set(targets.experts)
    assert names == expected, "PEFT adapted other weights than the targets"
    _set_trainable(model, adapted, previously=trainable, only_optimize_lora=only_optimize_lora)
    return len(adapted)


@dataclass(frozen=True)
class LoraTargets:
    """The names of linear layers, and of the parameters in which experts are stacked."""

    layers: list[str]
    experts: list[str]


def lora_targets(
    inner: nn.Module,
    module_name: Optional[str] = None,
    target_modules: Sequence[str] = (),
    *,
    experts: bool = True,
    prefix: str = "--",
) -> LoraTargets:
    """Return what ``add_lora`` adapts: all linear layers and experts, or those chosen.

    Args:
        inner: a transformers model.
        module_name: choose the layers whose full name contains this.
        target_modules: choose the layers with one of these names, or with a full name that one of
            these regular expressions matches; "all-linear" stands for all layers.
        experts: choose among the parameters of experts, too.
        prefix: of the command-line flags, for messages.

    Raises:
        ValueError: a name or an expression matches no layer; the message lists names that exist.
    """
    layers = linear_names(inner)
    stacked = expert_names(inner) if experts else []
    chosen = set(_chosen(layers + stacked, module_name, target_modules, prefix, inner))
    return LoraTargets(
        [name for name in layers if name in chosen], [name for name in stacked if name in chosen]
    )


def _chosen(
    names: list[str],
    module_name: Optional[str],
    target_modules: Sequence[str],
    prefix: str,
    inner: nn.Module,
) -> list[str]:
    """Return the names that the flags choose; see ``lora_targets``."""
    if module_name is not None:
        found = [name for name in names if module_name in name]
        if not found:
            form = "a part of such a name"
            _refuse_target(f"{prefix}lora_module_name", module_name, form, names, inner)
        return found
    if not target_modules or ALL_LINEAR in target_modules:
        return names
    for target in target_modules:
        if not any(_is_target(name, target) for name in names):
            form = "such names, or a regular expression that matches full ones"
            _refuse_target(f"{prefix}target_modules", target, form, names, inner)
    return [name for name in names if any(_is_target(name, target) for target in target_modules)]


def _is_target(name: str, target: str) -> bool:
    """Return whether `target` is the end of a layer's name, or an expression that matches all."""
    return f".{name}".endswith(f".{target}") or re.fullmatch(target, name) is not None


def _refuse_target(flag: str, target: str, form: str, names: list[str], inner: nn.Module) -> None:
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    raise ValueError(
        f"{flag} {target!r} matches no linear layer of {type(inner).__name__}'s decoder. "
        f"Leave it out to adapt all of them, or give {form}: "
        f"{', '.join(last_parts)} (in full: {first_names(names, 2)})."
    )


def _shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, which ZeRO-3 may have partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _check_rank(dim: int, widest: int, *, flag: str) -> None:
    """Check that a rank is not larger than the widest matrix that it adapts."""
    if dim > widest:
        raise ValueError(
            f"{flag} {dim}: the largest adapted matrix has "
            f"{widest} rows or columns, and a higher rank adds nothing. Give a smaller one."
        )


def _set_trainable(
    model: nn.Module,
    adapted: dict[str, LoraLayer],
    *,
    previously: set[int],
    only_optimize_lora: bool,
) -> None:
    """Freeze everything but the adapters, and unfreeze what trains besides them."""
    adapters = lora_parameter_names(model)
    for name, parameter in model.named_parameters():
        if name not in adapters:
            parameter.requires_grad_(False)
    if only_optimize_lora:
        head = getattr(pretrained(model), SCORE_HEAD, None)
        unfrozen = [] if head is None else list(head.parameters())
    else:
        adapted_weights = {id(adapted_weight(layer)) for layer in adapted.values()}
        unfrozen = [p for p in model.parameters() if id(p) not in adapted_weights]
    for parameter in unfrozen:
        if id(parameter) in previously:
            parameter.requires_grad_(True)


LITTLE = 0.5  # share of the decoder's weights below which LoRA changes little of a model


def lora_coverage(model: nn.Module) -> float:
    """Return the share of the decoder layers' weights that have adapters; vectors do not count."""
    _, layers = decoder_layers(pretrained(model))
    adapters = lora_parameter_names(layers)
    shapes = [_shape(p) for name, p in layers.named_parameters() if name not in adapters]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    adapted = [adapted_weight(layer) for layer in lora_layers(layers).values()]
    return sum(math.prod(_shape(weight)) for weight in adapted) / matrices


def log_lora(model: nn.Module, *, chosen: bool, prefix: str = "--") -> None:
    """Log the share of the weights that LoRA adapts, and what trains besides.

    Less than half of the decoder's weights is a warning, unless the user chose them.

    Args:
        model: after ``add_lora``; without adapters nothing is logged.
        chosen: the user chose the layers.
        prefix: of the flags that the line names.
    """
    if not has_lora(model):
        return
    adapters = lora_parameter_names(model)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    besides = sum(sizes[name] for name in trained if name not in adapters)
    share = lora_coverage(model)
    text = f"LoRA adapts {share:.0%} of the decoder layers' weights"
    if besides:
        text += f"; {besides / sum(sizes.values()):.1%} of all parameters train without adapters"
    if share >= LITTLE or chosen:
        logger.info(text)
        return
    remedy = f"To train the others too, leave out --only_optimize_lora, or {prefix}lora_dim."
    if expert_names(pretrained(model)) and not expert_adapters(model):
        remedy = "Experts have no adapters: leave out --no_lora_experts to adapt them."
    logger.warning(f"{text}. {remedy}")


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers of `model` by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def expert_adapters(model: nn.Module) -> list[LoraLayer]:
    """Return the adapters of experts in `model`."""
    return [layer for layer in lora_layers(model).values() if isinstance(layer, ParamWrapper)]


def adapted_weight(layer: LoraLayer) -> torch.Tensor:
    """Return the frozen weight that an adapter changes."""
    return getattr(layer.get_base_layer(), _leaf(layer))


def adapted_name(name: str, layer: LoraLayer) -> str:
    """Return the name that the weight of an adapted layer `name` has in a model without LoRA."""
    return f"{plain_name(name)}.{_leaf(layer)}"


def _leaf(layer: LoraLayer) -> str:
    """Return the name of an adapted weight in its module."""
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has in a model without LoRA."""
    return name.replace(".base_layer", "")


def has_lora(model: nn.Module) -> bool:
    """Return whether `model` holds adapters."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def lora_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters' parameters, as named_parameters() gives them.

    They are A and B of each adapted layer, and the changed rows of new tokens.
    """
    names = {f"{name}.{CHILD}.delta" for name, _ in new_token_modules(model)}
    for prefix, layer in lora_layers(model).items():
        for name, _ in layer.named_parameters():
            if not name.startswith("base_layer."):
                names.add(f"{prefix}.{name}")
    return names


def adapted_layer_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that adapters wrap; these hold the frozen weights."""
    return [
        f"{name}.base_layer"
        for name, layer in lora_layers(model).items()
        if not isinstance(layer, ParamWrapper)
    ]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute without adapters in this context, as `model` did before ``add_lora``.

    With `only_optimize_lora` this is the reference policy.
    """
    layers = list(lora_layers(model).values())
    rows = [tokens for _, tokens in new_token_modules(model)]
    before = [layer._disable_adapters for layer in layers]
    were_off = [tokens.is_off for tokens in rows]
    try:
        for layer in layers:
            # PEFT's enable_adapters() would also change requires_grad, which optimizers rely on.
            layer._disable_adapters = True
        for tokens in rows:
            tokens.is_off = True
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled
        for tokens, was_off in zip(rows, were_off, strict=True):
            tokens.is_off = was_off


def merged_state_dict(
    model: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `tensors` with every adapter merged into its weight: W + s B A, or the rows W + D.

    Names are those of the model without LoRA. The sum is taken in fp32 and rounded once, to the
    dtype of W. Neither `model` nor `tensors` changes, so training can continue from unrounded
    weights. Without adapters, the result is a copy of the dict.

    Args:
        model: tells which layers are adapted and by what scale. Its parameters are not read, so
            they may be partitioned.
        tensors: whole tensors on the CPU by the names of `model`.state_dict(): W, A and B of
            ``low_rank_update``.

    Raises:
        KeyError: an adapted layer's W, A or B is not among `tensors`.
    """
    merged = dict(tensors)
    merge_new_tokens(model, merged)
    updates = {}
    for name, layer in lora_layers(model).items():
        a, b = (merged.pop(f"{name}.lora_{side}.{ADAPTER}.weight") for side in ("A", "B"))
        updates[adapted_name(name, layer)] = (layer, a, b)
    merged = {plain_name(name): tensor for name, tensor in merged.items()}
    for name, (layer, a, b) in updates.items():
        weight = merged[name]
        update = low_rank_update(layer, a.float(), b.float(), shape=weight.shape)
        merged[name] = (weight.float() + update).to(weight.dtype)
    return merged


def low_rank_update(
    layer: LoraLayer, a: torch.Tensor, b: torch.Tensor, *, shape: torch.Size
) -> torch.Tensor:
    """Return what an adapter adds to its weight: s B A, in the dtype of `a` and `b`.

    Args:
        layer: tells the scale and the layout.
        a: A [dim, in]; of experts [experts * dim, in].
        b: B [out, dim]; of experts [out, dim * experts].
        shape: of the weight: [out, in] (Conv1D: [in, out]); of experts, one for each.
    """
    scale = layer.scaling[ADAPTER]
    if isinstance(layer, ParamWrapper):
        owner = layer.get_base_layer()
        return scale * expert_product(a, b, shape=shape, outputs_first=has_outputs_first(owner))
    update = scale * (b @ a)
    return update.T if layer.fan_in_fan_out else update


def has_outputs_first(experts: nn.Module) -> bool:
    """Return whether PEFT takes the weights of `experts` as [experts, out, in]."""
    return not getattr(experts, "is_transposed", False)


def expert_product(
    a: torch.Tensor, b: torch.Tensor, *, shape: torch.Size, outputs_first: bool
) -> torch.Tensor:
    """Return the products B A of all experts, in the layout of PEFT's ParamWrapper.

    Args:
        a: A [experts * dim, in], expert by expert.
        b: B [out, dim * experts], in each group of `experts` columns one for each of them.
        shape: of the weights.
        outputs_first: `shape` is [experts, out, in], not [experts, in, out].
    """
    count = shape[0]
    downs = a.reshape(count, -1, a.shape[-1])
    ups = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    product = torch.bmm(ups, downs)
    return product if outputs_first else product.mT
