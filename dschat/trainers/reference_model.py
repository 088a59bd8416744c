"""The reference policy: the model before training, computed as the trained model computes it."""

from collections.abc import Callable

import torch

from dschat.config.options import LoraOptions, SystemOptions
from dschat.engine.quantized import quantize_linears
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import lora_targets


def reference_loader(
    system: SystemOptions, lora: LoraOptions, *, prefix: str = "--"
) -> Callable[..., torch.nn.Module]:
    """Return the function that loads the reference.

    If the trained model holds quantized weights, it rounds the same; otherwise it is
    ``load_causal_lm``.

    Args:
        system: options of the trained model.
        lora: LoRA options of the trained model.
        prefix: of the trained model's LoRA flags, for messages.
    """
    kind = system.frozen_format
    if kind == "none":
        return load_causal_lm

    def load_rounded(path: str, **loading) -> torch.nn.Module:
        model = load_causal_lm(path, **loading)
        targets = lora_targets(
            model,
            lora.lora_module_name,
            lora.target_modules,
            experts=lora.lora_experts,
            prefix=prefix,
        )
        quantize_linears(model, targets.layers, kind)
        return model

    return load_rounded
