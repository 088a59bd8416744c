"""Rows of new tokens that train although their embedding, or their head, is frozen.

A token that the vocabulary has just got has an untrained row. If its matrix W is frozen, as with
LoRA, the change D of the new rows alone trains: W stays as it is, and the outputs for these tokens
are computed with W + D. D starts at zero, so at first nothing changes. The change of an embedding
NAME is the parameter NAME.new_tokens.delta; a tied head uses the same.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.models.structure import pretrained

CHILD = "new_tokens"  # name of the module inside the embedding or the head


class NewTokens(nn.Module):
    """The trained change of a frozen matrix's rows `ids`, [n, columns].

    Args:
        ids: of the tokens.
        weight: the frozen matrix [rows, columns], whole or partitioned.
    """

    def __init__(self, ids: Iterable[int], weight: torch.Tensor):
        super().__init__()
        numbers = torch.tensor(list(ids), device=weight.device)
        columns = getattr(weight, "ds_shape", weight.shape)[1]
        self.register_buffer("ids", numbers, persistent=False)
        self.delta = nn.Parameter(weight.detach().new_zeros(len(numbers), columns))
        self.is_off = False

    def forward(
        self, inputs: torch.Tensor, output: torch.Tensor, *, scale: Any = None
    ) -> torch.Tensor:
        """Return the output of the embedding or the head with the changed rows.

        Args:
            inputs: ids [...] int64 of the embedding; hidden states [..., columns] of the head.
            output: the module's output without the change; that of a head is changed in place,
                since logits are large.
            scale: multiplies an embedding's rows in some families.
        """
        if not inputs.is_floating_point():
            is_new = inputs[..., None] == self.ids
            change = is_new.to(self.delta.dtype) @ self.delta
            return output + (change if scale is None else change * scale)
        change = F.linear(inputs.to(self.delta.dtype), self.delta)
        return output.index_add_(-1, self.ids, change.to(output.dtype))


def new_token_ids(
    tokenizer: PreTrainedTokenizerBase, *, rows: int, added: Iterable[int]
) -> list[int]:
    """Return the ids of tokens that no training of the model has seen, but for padding.

    Args:
        tokenizer: of the model.
        rows: of the model's embedding as it was saved.
        added: ids of tokens that were added to the tokenizer after that.
    """
    ids = {*range(rows, len(tokenizer)), *added}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.discard(tokenizer.pad_token_id)
    return sorted(ids)


def train_new_tokens(model: nn.Module, ids: Iterable[int]) -> bool:
    """Let the rows of new tokens train, in place, of an embedding and a head that are frozen.

    Args:
        model: a causal language model or RewardModel whose other parameters are set up already.
        ids: of the tokens.

    Returns:
        Whether rows train that did not before.
    """
    inner = pretrained(model)
    ids = list(ids)
    frozen = [module for module in _matrices(inner) if not module.weight.requires_grad]
    for module in frozen if ids else []:
        _attach(inner, module, NewTokens(ids, module.weight))
    return bool(ids and frozen)


def copy_new_tokens(source: nn.Module, target: nn.Module) -> None:
    """Prepare `target` to hold the trained rows of `source`, a model of the same class."""
    modules = dict(target.named_modules())
    for name, tokens in new_token_modules(source):
        module = modules[name]
        _attach(target, module, NewTokens(tokens.ids.tolist(), module.weight))


def new_token_modules(model: nn.Module) -> Iterator[tuple[str, NewTokens]]:
    """Yield the names of the embedding and the head with trained rows, and these rows."""
    for name, module in model.named_modules():
        if isinstance(module, NewTokens):
            yield name.removesuffix(f".{CHILD}"), module


def merge_new_tokens(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Add the trained change of rows to the matrices in `tensors`, and remove it from the dict.

    Args:
        model: tells which rows. Its parameters are not read.
        tensors: whole tensors on the CPU by the names of `model`.state_dict().
    """
    for name, tokens in new_token_modules(model):
        weight = tensors[f"{name}.weight"]
        delta = tensors.pop(f"{name}.{CHILD}.delta")
        ids = tokens.ids.to(weight.device)
        changed = weight.index_copy(0, ids, (weight[ids].float() + delta.float()).to(weight.dtype))
        # A tied head is the same tensor.
        for key in [key for key, t in tensors.items() if t.data_ptr() == weight.data_ptr()]:
            tensors[key] = changed


def head_is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head and the embedding are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _matrices(model: PreTrainedModel) -> list[nn.Module]:
    """Return the embedding, and the head unless it is tied or has no row for each token."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head_is_tied(model):
        return [embedding]
    rows = [getattr(m.weight, "ds_shape", m.weight.shape)[0] for m in (embedding, head)]
    return [embedding, head] if rows[0] == rows[1] else [embedding]


def _attach(model: PreTrainedModel, module: nn.Module, tokens: NewTokens) -> None:
    """Make `tokens` change the outputs of `module`, and those of a head that is tied to it."""
    module.add_module(CHILD, tokens)
    if module is not model.get_input_embeddings():
        module.register_forward_hook(partial(_with_change, tokens))
        return
    scale = getattr(module, "embed_scale", None)
    module.register_forward_hook(partial(_with_change, tokens, scale=scale))
    if head_is_tied(model):
        model.get_output_embeddings().register_forward_hook(partial(_with_change, tokens))


def _with_change(
    tokens: NewTokens, module: nn.Module, inputs: tuple, output: torch.Tensor, *, scale: Any = None
) -> torch.Tensor:
    """Return the output of `module` with the changed rows: a forward hook."""
    return output if tokens.is_off else tokens(inputs[0], output, scale=scale)
