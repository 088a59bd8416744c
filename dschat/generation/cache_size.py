"""The size of a model's cache, counted in a prefill on the meta device.

Keys and values may have other widths than the configuration's heads suggest: multi-query and latent
attention (DeepSeek-V2, section 2.1) cache less, and recurrent layers cache a state that does not
grow with the text. A prefill of two lengths shows both without any weight.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.models.structure import cache_argument, decoder_layers
from dschat.runtime.log import logger

# Prompts of the two prefills, in tokens. They are shorter than any sliding window.
SHORT, LONG = 2, 3


@dataclass(frozen=True)
class LayerCache:
    """The elements that one layer caches for one text."""

    per_token: int  # keys and values together
    fixed: int = 0  # recurrent and convolution states
    window: int | None = None  # most tokens that are kept; None: all

    def elements(self, positions: int) -> int:
        """Return the elements for a text of `positions` tokens."""
        kept = positions if self.window is None else min(positions, self.window)
        return self.fixed + self.per_token * kept


@dataclass(frozen=True)
class CacheSize:
    """The elements that a model caches for one text."""

    kinds: tuple[tuple[LayerCache, int], ...] = ()  # layers, and how many are alike
    counted: bool = True  # False: an upper bound, because the model cannot run without weights

    def elements(self, *, rows: int, positions: int) -> int:
        """Return the elements for `rows` texts of `positions` tokens."""
        return rows * sum(count * layer.elements(positions) for layer, count in self.kinds)


def class_cache(kind: type[PreTrainedModel], config: PreTrainedConfig) -> CacheSize:
    """Return the cache size of a causal language model of class `kind`; nothing is allocated.

    The caller's random numbers are not used.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = kind._from_config(copy.deepcopy(config))
    return count_cache(model)


def count_cache(model: PreTrainedModel, *, unbuilt: int = 0) -> CacheSize:
    """Return the cache size of a causal language model on the meta device, without adapters.

    It is an upper bound if the forward pass needs values (some mixtures of experts do).

    Args:
        model: on the meta device.
        unbuilt: further layers that are like the model's last one.
    """
    try:
        with _nothing_reads_values(model):
            short = _cached(model, SHORT)
            long = _cached(model, LONG)
    except Exception as error:  # a forward pass may fail in any way without values
        logger.debug("%s: no prefill on the meta device: %s", type(model).__name__, error)
        return _upper_bound(model, unbuilt=unbuilt)
    layers = [
        LayerCache(more - less, fixed=less - SHORT * (more - less), window=window)
        for (less, window), (more, _) in zip(short, long, strict=True)
    ]
    states = LayerCache(0, fixed=_states_in_modules(model))
    if not any(layer.elements(LONG) for layer in [states, *layers]):
        return _upper_bound(model, unbuilt=unbuilt)
    return _grouped([states, *layers, *layers[-1:] * unbuilt])


def _grouped(layers: list[LayerCache], *, counted: bool = True) -> CacheSize:
    return CacheSize(tuple(Counter(layers).items()), counted)


@contextlib.contextmanager
def _nothing_reads_values(model: PreTrainedModel) -> Iterator[None]:
    """Run a forward pass in this context without what reads values.

    Experts run as one batched product instead of a loop over those that are hit, and nothing looks
    for padding in the ids.
    """
    config = model.config
    training = model.training
    experts = config._experts_implementation
    pad_token_id = getattr(config, "pad_token_id", None)
    model.eval()
    config._experts_implementation = "batched_mm"
    vars(config)["pad_token_id"] = None  # past the check of its type
    try:
        yield
    finally:
        config._experts_implementation = experts
        vars(config)["pad_token_id"] = pad_token_id
        model.train(training)


def _cached(model: PreTrainedModel, tokens: int) -> list[tuple[int, int | None]]:
    """Return the elements and the window of each layer of the cache after a prefill [1, tokens]."""
    cache = DynamicCache(config=model.config)
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    return [(_elements(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]


def _elements(layer: Any) -> int:
    """Return the elements of the tensors that a layer of a cache holds; counters do not count."""
    return sum(tensor.numel() for tensor in _tensors(vars(layer)) if tensor.dim() > 1)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _states_in_modules(model: nn.Module) -> int:
    """Return the elements of states that modules keep themselves, and drop them.

    RecurrentGemma's layers do that instead of filling a cache.
    """
    found = 0
    for module in model.modules():
        states = [
            name
            for name, value in vars(module).items()
            if name.endswith(("_state", "_states")) and isinstance(value, torch.Tensor)
        ]
        for name in states:
            found += getattr(module, name).numel()
            setattr(module, name, None)
    return found


def _upper_bound(model: PreTrainedModel, *, unbuilt: int) -> CacheSize:
    """Return a bound: keys and values are at most as wide as the widest product of attention."""
    _, layers = decoder_layers(model)
    found = [LayerCache(2 * _widest_attention(layer, model.config)) for layer in layers]
    return _grouped(found + found[-1:] * unbuilt, counted=False)


def _widest_attention(layer: nn.Module, config: PreTrainedConfig) -> int:
    """Return the most outputs of a linear layer of attention, or the hidden size."""
    outputs = [
        module.nf if isinstance(module, Conv1D) else module.out_features
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "att" in name.lower()
    ]
    return max(outputs, default=config.get_text_config().hidden_size)
