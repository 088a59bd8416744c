"""From a loaded model to one that is ready to train: frozen layers, adapters, checkpointing."""

import torch

from dschat.config.options import LoraOptions, SystemOptions
from dschat.models.causal_lm import enable_checkpointing, freeze_lower_layers
from dschat.models.lora import add_lora, lora_parameter_names


def prepare_for_training(
    model: torch.nn.Module, *, lora: LoraOptions, system: SystemOptions, role: str = ""
) -> set[str]:
    """Freeze, adapt and checkpoint `model` (a causal LM or a RewardModel) in place.

    Args:
        role: "actor" or "critic" in step 3, for the flags' names in messages.

    Returns:
        The names of the LoRA parameters, which get a learning rate of their own.

    Raises:
        ValueError: more layers to freeze than there are, or a LoRA scope that matches nothing.
    """
    prefix = f"--{role}_" if role else "--"
    if lora.lora_dim:
        add_lora(
            model,
            dim=lora.lora_dim,
            alpha=lora.lora_alpha,
            module_name=lora.lora_module_name,
            only_optimize_lora=lora.only_optimize_lora,
            flag=f"{prefix}lora_module_name",
        )
    if system.freeze_layers:
        freeze_lower_layers(model, system.freeze_layers, flag=f"{prefix}freeze_layers")
    if system.gradient_checkpointing:
        enable_checkpointing(model)
    return lora_parameter_names(model)
