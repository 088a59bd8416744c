"""LoRA adapters (Hu et al. 2021), injected by PEFT so that the model keeps its class and its names.

A wrapped layer NAME keeps its weight W as NAME.base_layer.weight. It adds
NAME.lora_A.default.weight (A) and NAME.lora_B.default.weight (B). Its output is W x + s B A x with
s = alpha / dim. B starts at zero.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.models.structure import SCORE_HEAD, decoder_layers, linear_names, pretrained
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
    dropout: float = 0.0,
    use_rslora: bool = False,
    prefix: str = "--",
) -> int:
    """Add LoRA adapters to linear layers of the decoder, in place; never to the head or embeddings.

    Adapters take the dtype of their weights, since ZeRO-3 wants one dtype throughout.

    With `only_optimize_lora`, the adapters and the score head train. Without it, everything but the
    adapted weights trains: embeddings, norms, biases and heads, as in DeepSpeed-Chat. Parameters
    that were frozen before stay frozen.

    Args:
        model: a causal language model or RewardModel, without adapters.
        dim: rank of the adapters.
        alpha: the update is multiplied by alpha / dim.
        module_name: see ``target_names``.
        target_modules: see ``target_names``.
        only_optimize_lora: freeze everything but the adapters and the score head.
        dropout: probability of dropout on the input of A.
        use_rslora: multiply by alpha / sqrt(dim) instead (Kalajdzievski 2023, rsLoRA).
        prefix: of the command-line flags, for messages.

    Returns:
        The number of adapted layers.

    Raises:
        ValueError: a name matches no layer; the message lists names that exist. Or `dim` is larger
            than every adapted matrix.
    """
    inner = pretrained(model)
    targets = target_names(inner, module_name, target_modules, prefix=prefix)
    path, layers = decoder_layers(inner)
    _check_rank(dim, [inner.get_submodule(name) for name in targets], flag=f"{prefix}lora_dim")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=[name.removeprefix(f"{path}.") for name in targets],
        fan_in_fan_out=isinstance(inner.get_submodule(targets[0]), Conv1D),
    )
    # Into the layers alone, which have no configuration: by a model's type, PEFT would replace the
    # targets of some mixtures of experts and refuse those of recurrent models.
    inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    adapted = lora_layers(inner)
    assert set(adapted) == set(targets), "PEFT adapted other layers than the targets"
    _set_trainable(model, adapted, previously=trainable, only_optimize_lora=only_optimize_lora)
    return len(targets)


def target_names(
    inner: nn.Module,
    module_name: Optional[str] = None,
    target_modules: Sequence[str] = (),
    *,
    prefix: str = "--",
) -> list[str]:
    """Return the names of the linear layers that ``add_lora`` adapts: all, or those chosen.

    Args:
        inner: a transformers model.
        module_name: choose the layers whose full name contains this.
        target_modules: choose the layers with one of these names, or with a full name that one of
            these regular expressions matches; "all-linear" stands for all layers.
        prefix: of the command-line flags, for messages.

    Raises:
        ValueError: a name or an expression matches no layer; the message lists names that exist.
    """
    names = linear_names(inner)
    if module_name is not None:
        found = [name for name in names if module_name in name]
        if not found:
            _refuse_target(f"{prefix}lora_module_name", module_name, "a part of such a name", inner)
        return found
    if not target_modules or ALL_LINEAR in target_modules:
        return names
    for target in target_modules:
        if not any(_is_target(name, target) for name in names):
            _refuse_target(
                f"{prefix}target_modules",
                target,
                "such names, or a regular expression that matches full ones",
                inner,
            )
    return [name for name in names if any(_is_target(name, target) for target in target_modules)]


def _is_target(name: str, target: str) -> bool:
    """Return whether `target` is the end of a layer's name, or an expression that matches all."""
    return f".{name}".endswith(f".{target}") or re.fullmatch(target, name) is not None


def _refuse_target(flag: str, target: str, form: str, inner: nn.Module) -> None:
    names = linear_names(inner)
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    raise ValueError(
        f"{flag} {target!r} matches no linear layer of {type(inner).__name__}'s decoder. "
        f"Leave it out to adapt all of them, or give {form}: "
        f"{', '.join(last_parts)} (in full: {first_names(names, 2)})."
    )


def _check_rank(dim: int, layers: list[nn.Module], *, flag: str) -> None:
    """Check that a rank is not larger than every matrix that it adapts."""
    widest = 0
    for layer in layers:
        if isinstance(layer, Conv1D):
            widest = max(widest, layer.nx, layer.nf)
        else:
            widest = max(widest, layer.in_features, layer.out_features)
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
        adapted_weights = {id(layer.base_layer.weight) for layer in adapted.values()}
        unfrozen = [p for p in model.parameters() if id(p) not in adapted_weights]
    for parameter in unfrozen:
        if id(parameter) in previously:
            parameter.requires_grad_(True)


LITTLE = 0.5  # share of the decoder's weights below which LoRA changes little of a model


def lora_coverage(model: nn.Module) -> float:
    """Return the share of the decoder layers' weights that have adapters; vectors do not count."""
    _, layers = decoder_layers(pretrained(model))
    adapters = lora_parameter_names(layers)
    weights = [p for name, p in layers.named_parameters() if name not in adapters]
    shapes = [getattr(p, "ds_shape", p.shape) for p in weights]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    adapted = {id(layer): layer.base_layer.weight for layer in lora_layers(layers).values()}
    return sum(math.prod(getattr(w, "ds_shape", w.shape)) for w in adapted.values()) / matrices


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
    logger.warning(
        f"{text}. The other weights are not in linear layers (experts are stacked in tensors with "
        f"three dimensions). To train them too, leave out {prefix}only_optimize_lora, or "
        f"{prefix}lora_dim."
    )


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers of `model` by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def has_lora(model: nn.Module) -> bool:
    """Return whether `model` holds adapters."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def lora_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters' A and B matrices, as named_parameters() gives them."""
    names = set()
    for prefix, layer in lora_layers(model).items():
        for name, _ in layer.named_parameters():
            if not name.startswith("base_layer."):
                names.add(f"{prefix}.{name}")
    return names


def adapted_layer_names(model: nn.Module) -> list[str]:
    """Return the names of the layers that adapters wrap; these hold the frozen weights."""
    return [f"{name}.base_layer" for name in lora_layers(model)]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute without adapters in this context, as `model` did before ``add_lora``.

    With `only_optimize_lora` this is the reference policy.
    """
    layers = list(lora_layers(model).values())
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            # PEFT's enable_adapters() would also change requires_grad, which optimizers rely on.
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


def merged_state_dict(
    model: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `tensors` with every adapter merged into its weight: W + s B A.

    Names are those of the model without LoRA. The sum is taken in fp32 and rounded once, to the
    dtype of W. Neither `model` nor `tensors` changes, so training can continue from unrounded
    weights. Without adapters, the result is a copy of the dict.

    Args:
        model: tells which layers are adapted and by what scale. Its parameters are not read, so
            they may be partitioned.
        tensors: whole tensors on the CPU by the names of `model`.state_dict(): W [out, in] (Conv1D:
            [in, out]), A [dim, in], B [out, dim].

    Raises:
        KeyError: an adapted layer's W, A or B is not among `tensors`.
    """
    merged = dict(tensors)
    for name, layer in lora_layers(model).items():
        weight = merged.pop(f"{name}.base_layer.weight")
        a = merged.pop(f"{name}.lora_A.{ADAPTER}.weight")
        b = merged.pop(f"{name}.lora_B.{ADAPTER}.weight")
        update = layer.scaling[ADAPTER] * (b.float() @ a.float())
        if layer.fan_in_fan_out:
            update = update.T
        merged[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged
