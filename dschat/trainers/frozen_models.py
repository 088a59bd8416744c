"""Models that do not train, in the storage of --quantize_frozen: reference and reward models."""

from collections.abc import Callable

import torch

from dschat.config.options import FrozenFormat, LoraOptions
from dschat.engine.quantized import quantize_linears
from dschat.models.lora import lora_targets
from dschat.models.structure import pretrained


def rounded(
    load: Callable[..., torch.nn.Module],
    kind: FrozenFormat,
    lora: LoraOptions,
    *,
    prefix: str = "--",
) -> Callable[..., torch.nn.Module]:
    """Return a function that loads a model as `load` does, and quantizes its linear layers.

    A reference is rounded as the trained model is, so that it computes what training began from.

    Args:
        load: ``load_causal_lm`` or ``load_reward_model``.
        kind: the storage; "none": the result is `load` itself.
        lora: options that choose the layers.
        prefix: of the flags of `lora`, for messages.
    """
    if kind == "none":
        return load

    def load_rounded(path: str, **loading) -> torch.nn.Module:
        model = load(path, **loading)
        inner = pretrained(model)
        targets = lora_targets(
            inner,
            lora.lora_module_name,
            lora.target_modules,
            experts=lora.lora_experts,
            prefix=prefix,
        )
        quantize_linears(inner, targets.layers, kind)
        return model

    return load_rounded
