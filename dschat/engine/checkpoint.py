"""Saving models as Hugging Face folders."""

from pathlib import Path

import torch

from dschat.engine.zero import full_tensors
from dschat.models.export import save_pretrained_folder
from dschat.models.lora import has_lora, merged_state_dict
from dschat.tracking import dist
from dschat.tracking.log import logger


def save_model(
    model: torch.nn.Module, tokenizer, path: str | Path, *, tensors: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a complete Hugging Face folder: weights (adapters merged), configuration, tokenizer, chat template.

    Works under every ZeRO stage: parameters are gathered one at a time. The folder appears whole or not at all.
    Every process must call it.

    Args:
        model: a transformers model, not its engine nor a wrapper.
        tensors: what ``full_tensors`` gave, to be saved instead of the model's weights as they are.
    """
    tensors = full_tensors(model) if tensors is None else tensors
    if dist.is_main():
        if has_lora(model):
            tensors = merged_state_dict(model, tensors)
        save_pretrained_folder(model, tensors, tokenizer, path)
        logger.info(f"saved {path}")
    dist.barrier()
