"""Preparation of a loaded model for training: frozen layers, adapters, gradient checkpointing."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from dschat.config.options import LoraOptions, SystemOptions
from dschat.models.lora import add_lora, lora_parameter_names
from dschat.models.new_tokens import train_new_tokens
from dschat.models.structure import decoder_layers, embedding_modules, pretrained
from dschat.models.weights import first_names

logger = logging.getLogger(__name__)


def prepare_for_training(
    model: torch.nn.Module, *, lora: LoraOptions, system: SystemOptions, role: str = ""
) -> set[str]:
    """Add LoRA, freeze layers and enable gradient checkpointing in `model`, in place.

    Rows of new tokens train even if their embedding or head is frozen (new_tokens.py).

    Args:
        model: a causal LM or a RewardModel; its attribute `new_token_ids`, if any, names them.
        lora: the LoRA options.
        system: gives the number of layers to freeze and whether to checkpoint.
        role: "actor" or "critic" in step 3, for the flags' names in messages.

    Returns:
        The names of the LoRA parameters, which get a separate learning rate.

    Raises:
        ValueError: more layers to freeze than there are, or a name of modules that matches nothing.
    """
    prefix = f"--{role}_" if role else "--"
    if lora.lora_dim:
        add_lora(
            model,
            dim=lora.lora_dim,
            alpha=lora.lora_alpha,
            module_name=lora.lora_module_name,
            target_modules=lora.target_modules,
            only_optimize_lora=lora.only_optimize_lora,
            experts=lora.lora_experts,
            use_rslora=lora.use_rslora,
            prefix=prefix,
        )
        if lora.modules_to_save:
            train_modules(model, lora.modules_to_save, flag=f"{prefix}modules_to_save")
    if system.freeze_layers:
        freeze_lower_layers(model, system.freeze_layers, flag=f"{prefix}freeze_layers")
    if system.gradient_checkpointing:
        enable_checkpointing(model)
    new = getattr(pretrained(model), "new_token_ids", [])
    if train_new_tokens(model, new):
        logger.info(
            "the rows of %d new token(s) train, with the rest of their matrix frozen: ids %s",
            len(new),
            ", ".join(map(str, new[:8])),
        )
    return lora_parameter_names(model) if lora.lora_dim else set()


def train_modules(model: nn.Module, wanted: Sequence[str], *, flag: str) -> None:
    """Let modules outside of the adapters train whole, in place.

    The attribute `modules_to_save` of the transformers model then holds their full names.

    Args:
        model: a causal LM or a RewardModel, with adapters.
        wanted: names, or ends of names.
        flag: the command-line flag that `wanted` came from, for messages.

    Raises:
        ValueError: a name matches no module; the message lists names that exist.
    """
    inner = pretrained(model)
    adapters = lora_parameter_names(inner)
    parameters = dict(inner.named_parameters(remove_duplicate=False))
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters if name not in adapters)
    # Adapted matrices stay frozen: a wrapped layer's own name is not that of its matrix.
    names = [name for name in owners if not name.endswith(".base_layer")]
    found = []
    for word in wanted:
        matched = [name for name in names if f".{name}".endswith(f".{word}")]
        if not matched:
            prefix, _ = decoder_layers(inner)
            outside = [name for name in names if not name.startswith(f"{prefix}.")]
            raise ValueError(
                f"{flag} {word!r} matches no module of {type(inner).__name__} beside the adapted "
                f"layers. Outside of the decoder's layers there are {first_names(outside)}."
            )
        found += matched
    for name in found:
        inner.get_submodule(name).requires_grad_(True)
    inner.modules_to_save = list(dict.fromkeys(found))


def freeze_lower_layers(
    model: nn.Module, num_layers: int, *, flag: str = "--freeze_layers"
) -> None:
    """Freeze the token and position embeddings and the lowest decoder layers, in place.

    A head that is tied to the embedding is frozen with it. Call this after add_lora, so that
    adapters in the frozen layers are frozen as well.

    Args:
        model: a causal LM or a RewardModel.
        num_layers: the number of decoder layers; 0 freezes nothing.
        flag: the command-line flag that `num_layers` came from, for messages.

    Raises:
        ValueError: the model has fewer layers, or the number is negative.
    """
    _, layers = decoder_layers(model)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"{flag} {num_layers} does not fit a model of {len(layers)} layers; "
            f"give 0 to {len(layers)}."
        )
    if num_layers == 0:
        return
    for module in [*embedding_modules(model), *layers[:num_layers]]:
        module.requires_grad_(False)


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Enable gradient checkpointing: recompute activations in backward.

    Training forwards must then pass use_cache=False. Generation keeps its cache, since
    checkpointing only acts in train mode.
    """
    inner = pretrained(model)
    # transformers 5.23 deprecates gradient_checkpointing_enable; 5.17 has only that.
    enable = (
        getattr(inner, "activation_checkpointing_enable", None)
        or inner.gradient_checkpointing_enable
    )
    enable({"use_reentrant": use_reentrant})
    if not use_reentrant:
        # transformers makes the embedding's output require a gradient. Only reentrant checkpoints
        # need that, if the embedding is frozen. Others would pay for a backward of frozen layers.
        inner.disable_input_require_grads()
