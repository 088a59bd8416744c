"""Dropout probabilities of a model and of its configuration."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from dschat.models.structure import pretrained


def _is_probability(name: str, value: Any) -> bool:
    """Return whether an attribute is a dropout probability, by its name and type."""
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)


def set_config_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every numeric entry of `config` with "drop" in its name to `probability`; layerdrop to 0.

    With layerdrop, one rank may skip a layer that another runs; their collectives would not match.
    """
    names = [name for name, value in vars(config).items() if _is_probability(name, value)]
    for name in names:
        setattr(config, name, 0.0 if "layerdrop" in name else float(probability))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in `model` to 0.

    This covers nn.Dropout modules (LoRA's too), numbers that modules keep for functional dropout,
    and the configuration. train() stays usable, which gradient checkpointing needs.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        names = [name for name, value in vars(module).items() if _is_probability(name, value)]
        for name in names:
            setattr(module, name, 0.0)
    set_config_dropout(pretrained(model).config, 0.0)
