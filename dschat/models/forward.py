"""Forward passes of causal language models on padded batches."""

import torch
from torch import nn

from dschat.models.families import PACKED_BY_MASK
from dschat.models.structure import forward_takes, pretrained


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return positions [B, T] int64 that count attended tokens only.

    Padding on the left gets 0; padding on the right gets the last position.

    Args:
        attention_mask: [B, T], 1 (or True) where a token counts.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def takes_position_ids(model: nn.Module) -> bool:
    """Return whether the model takes positions; ALiBi families (BLOOM) use the mask instead."""
    return forward_takes(pretrained(model).base_model, "position_ids")


def packed_inputs(model: nn.Module, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a forward over rows of several texts.

    transformers makes a block-diagonal mask where positions start again from 0. A few families
    need the mask itself.

    Args:
        model: the transformers model, or a wrapper of it.
        position_ids: [B, T] int64; see ``PackedBatch``.
    """
    inputs = {"position_ids": position_ids}
    if pretrained(model).config.model_type in PACKED_BY_MASK:
        inputs["attention_mask"] = block_diagonal_mask(position_ids)
    return inputs


def block_diagonal_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the causal mask [B, 1, T, T] bool under which a token sees its own text alone.

    Args:
        position_ids: [B, T] int64; a text begins at each 0.
    """
    text = (position_ids == 0).cumsum(-1)
    length = position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    return (text[:, None, :, None] == text[:, None, None, :]) & causal


def forward_logits(
    engine: nn.Module,
    model: nn.Module,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    logits_to_keep: int = 0,
) -> torch.Tensor:
    """Return the logits [B, K, V] of the last K positions.

    Args:
        engine: the module to call: a DeepSpeed engine around `model`, so that its hooks run, or
            `model` itself.
        model: the transformers model, whose forward tells which arguments exist.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where a token counts. Positions follow from it, so padding may be
            on either side. None: padding is on the right, where no token sees it; attention without
            a mask takes the fastest kernel.
        position_ids: [B, T] int64, of rows that hold several texts; see ``PackedBatch``. Only
            without `attention_mask`.
        logits_to_keep: K; 0 for all T positions.
    """
    inputs = dict(input_ids=input_ids, use_cache=False)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if attention_mask is not None and takes_position_ids(model):
        inputs["position_ids"] = position_ids_from_mask(attention_mask)
    if position_ids is not None:
        inputs |= packed_inputs(model, position_ids)
    if logits_to_keep and forward_takes(pretrained(model), "logits_to_keep"):
        inputs["logits_to_keep"] = logits_to_keep
    logits = engine(**inputs).logits
    return logits[:, -logits_to_keep:] if logits_to_keep else logits
