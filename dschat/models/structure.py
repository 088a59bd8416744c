"""The parts of a transformers model, found by structure instead of by name."""

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.models.families import EMBEDDING_MODULE_NAMES

# Every decoder-only sequence classifier of transformers names its head so.
SCORE_HEAD = "score"


def pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the outermost transformers model in `model`: itself, or the one inside a wrapper.

    Raises:
        TypeError: `model` holds no transformers model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(model).__name__} holds no transformers model")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the full name in `model` of the decoder's list of layers, and the list.

    It is the longest outermost nn.ModuleList of the base model. Lists inside lists do not count: a
    layer may hold more experts than the model has layers.

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
    """Return the full names of the nn.Linear and Conv1D modules inside the decoder layers.

    The head is never among them. Left out are routers of experts, which choose instead of compute,
    modules whose weight the layer reads without calling them, and those that share their weight.
    """
    prefix, layers = decoder_layers(model)
    read_directly = set(_read_directly(layers))
    experts = _num_experts(pretrained(model).config.get_text_config())
    linears = {
        name: module
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    owners = Counter(id(module.weight) for module in linears.values())
    return [
        f"{prefix}.{name}"
        for name, module in linears.items()
        if name not in read_directly
        and not _is_router(name, module, experts)
        and owners[id(module.weight)] == 1
    ]


def expert_names(model: nn.Module) -> list[str]:
    """Return the full names of the parameters in which experts of the decoder layers are stacked.

    transformers keeps them in modules whose class ends with "Experts", as [experts, out, in] or
    [experts, in, out]. Adapters around the modules do not change the names.
    """
    prefix, layers = decoder_layers(model)
    return [
        f"{prefix}.{name}.{leaf}".replace(".base_layer", "")
        for name, module in layers.named_modules()
        if type(module).__name__.endswith("Experts")
        for leaf, parameter in module.named_parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    ]


def _read_directly(layers: nn.Module) -> Iterator[str]:
    """Yield names of linear modules whose weights a fused computation reads without calling them.

    They are in the recurrent mixers of Mamba and its successors, which hold A_log, and in the
    AltUp of Gemma 3n. Zamba2's shared layers have built-in adapters.
    """
    for name, module in layers.named_modules():
        if hasattr(module, "A_log"):
            yield from (f"{name}.{leaf}" for leaf in ("out_proj", "dt_proj"))
        if name.endswith((".altup", "adapter_list")):
            yield from (f"{name}.{inner}" for inner, _ in module.named_modules())


def _num_experts(text: PreTrainedConfig) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((value for name in names if (value := getattr(text, name, None))), None)


def _is_router(name: str, module: nn.Module, experts: int | None) -> bool:
    """Return whether a linear module weighs experts: by its name, or by one output for each."""
    parts = name.split(".")
    if any(part.endswith("router") for part in parts) or parts[-1] == "gate":
        return True
    outputs = module.nf if isinstance(module, Conv1D) else module.out_features
    return experts is not None and outputs in (1, experts)


def embedding_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that turn ids into the first hidden states.

    They are the token and position embeddings, and what else a family has (EMBEDDING_MODULE_NAMES).
    """
    _, layers = decoder_layers(model)
    inner = {id(module) for module in layers.modules()}
    for name, module in pretrained(model).base_model.named_modules():
        is_extra = name.rsplit(".", 1)[-1] in EMBEDDING_MODULE_NAMES
        if id(module) not in inner and (isinstance(module, nn.Embedding) or is_extra):
            yield module


def forward_takes(model: nn.Module, argument: str) -> bool:
    """Return whether the forward of `model` has a parameter `argument`; **kwargs does not count."""
    return argument in _arguments(type(model))  # type: ignore[arg-type]


@functools.cache  # asked at each token
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: nn.Module) -> str:
    """Return the forward's name for the key-value cache.

    It is "cache", or "past_key_values" in older versions of transformers.
    """
    return "cache" if forward_takes(model, "cache") else "past_key_values"
