"""Saving models as Hugging Face folders."""

from pathlib import Path

import torch

from dschat.engine.quantized import dequantized_state_dict
from dschat.engine.zero import full_tensors
from dschat.models.adapters import ADAPTER_FOLDER, trains_only_adapters, write_adapter
from dschat.models.export import save_pretrained_folder
from dschat.models.lora import has_lora, merged_state_dict
from dschat.runtime import dist
from dschat.runtime.log import logger


def save_model(
    model: torch.nn.Module,
    tokenizer,
    path: str | Path,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete Hugging Face folder: weights, configuration, tokenizer and chat template.

    Adapters are merged into the weights. If adapters are all that was trained, they are also
    written to the folder adapter/ inside it, in the format of PEFT. Int8 weights are merged and
    saved in the precision of training.

    Works under every ZeRO stage: parameters are gathered one at a time. The folder appears whole
    or not at all. Every rank must call it.

    Args:
        model: a transformers model, not its engine nor a wrapper.
        tokenizer: saved with the model.
        path: the folder.
        tensors: a result of ``full_tensors``, saved instead of the current weights.
    """
    tensors = full_tensors(model) if tensors is None else tensors
    if dist.is_main():
        whole = dequantized_state_dict(model, tensors)
        merged = merged_state_dict(model, whole)
        save_pretrained_folder(
            model, merged, tokenizer, path, write_more=_adapter_writer(model, whole, tokenizer)
        )
        logger.info(f"saved {path}")
    dist.barrier()


def _adapter_writer(model: torch.nn.Module, tensors: dict[str, torch.Tensor], tokenizer):
    """Return the function that writes the adapter folder; None if there is none to write."""
    if not has_lora(model):
        return None
    merged = getattr(model, "merged_adapter", None)
    if merged is not None:
        logger.info(
            f"no adapter folder is written: training began from {merged} merged into its base, "
            "and no single folder holds this starting point"
        )
        return None
    if not trains_only_adapters(model):
        logger.info(
            "no adapter folder is written: other weights were trained, too (--only_optimize_lora "
            "trains adapters only)"
        )
        return None
    return lambda folder: write_adapter(model, tensors, folder / ADAPTER_FOLDER, tokenizer)
