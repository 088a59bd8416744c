"""Dropout probabilities of a model and of its configuration."""

from torch import nn
from transformers import PreTrainedConfig

from dschat.models.structure import pretrained


def _is_probability(name: str, value) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)


def set_config_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every numeric entry of `config` with "drop" in its name to `probability`, and layerdrop to 0.

    A layer that one process leaves out and another does not has no gradient to share: their collectives part ways.
    """
    for name in [n for n, v in vars(config).items() if _is_probability(n, v)]:
        setattr(config, name, 0.0 if "layerdrop" in name else float(probability))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in `model` to 0: nn.Dropout modules (LoRA's too), numbers that modules keep for
    functional dropout, and the configuration. train() stays usable, which gradient checkpointing needs.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in [n for n, v in vars(module).items() if _is_probability(n, v)]:
            setattr(module, name, 0.0)
    set_config_dropout(pretrained(model).config, 0.0)
