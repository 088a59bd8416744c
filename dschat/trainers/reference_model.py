"""The reference policy: the model that training starts from, as the trained one computes it before the first update."""

from collections.abc import Callable

import torch

from dschat.config.options import LoraOptions, SystemOptions
from dschat.engine.quantized import quantize_linears
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import target_names


def reference_loader(
    system: SystemOptions, lora: LoraOptions, *, flag: str
) -> Callable[..., torch.nn.Module]:
    """``load_causal_lm``; with MixZ++ what follows it by rounding the weights that the trained model has in int8.

    Args:
        system, lora: the trained model's.
        flag: that of `lora`'s module name, for messages.
    """
    if not system.enable_mixed_precision_lora:
        return load_causal_lm

    def load_rounded(path: str, **loading) -> torch.nn.Module:
        model = load_causal_lm(path, **loading)
        quantize_linears(model, target_names(model, lora.lora_module_name, flag=flag))
        return model

    return load_rounded
