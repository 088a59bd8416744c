"""The parts of a transformers model, found by structure instead of by name."""

import functools
import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.models.families import EMBEDDING_MODULE_NAMES


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The outermost transformers model in `model`: itself, or the one that a wrapper such as RewardModel holds."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(model).__name__} holds no transformers model")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's layers and their full name in `model`: the longest outermost nn.ModuleList of the base model.

    Lists inside lists do not count: a layer may hold more experts than the model has layers.

    Raises:
        ValueError: the base model holds no nn.ModuleList.
    """
    lists: dict[str, nn.ModuleList] = {}
    base = pretrained(model).base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    for name, module in base.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in lists
        ):
            lists[name] = module
    if not lists:
        raise ValueError(f"{type(pretrained(model)).__name__} has no list of decoder layers")
    name = max(lists, key=lambda n: len(lists[n]))
    return name, lists[name]


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the nn.Linear and Conv1D modules inside the decoder layers; the head is never among them."""
    prefix, layers = decoder_layers(model)
    return [
        f"{prefix}.{n}" for n, m in layers.named_modules() if isinstance(m, (nn.Linear, Conv1D))
    ]


def embedding_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that turn ids into the first hidden states: token and position embeddings and the family's extras."""
    _, layers = decoder_layers(model)
    inner = {id(module) for module in layers.modules()}
    for name, module in pretrained(model).base_model.named_modules():
        is_extra = name.rsplit(".", 1)[-1] in EMBEDDING_MODULE_NAMES
        if id(module) not in inner and (isinstance(module, nn.Embedding) or is_extra):
            yield module


def forward_takes(model: nn.Module, argument: str) -> bool:
    """Return whether the class of `model` names `argument` in its forward; **kwargs does not count."""
    return argument in _arguments(type(model))


@functools.cache  # asked at each token
def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: nn.Module) -> str:
    """Return the name of the key-value cache in the forward of `model`: "cache", or "past_key_values" in older transformers."""
    return "cache" if forward_takes(model, "cache") else "past_key_values"
