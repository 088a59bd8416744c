"""Decoder layers that share one compilation by torch.compile."""

import torch
from torch import nn

from dschat.generation.decoding import SlotCache, SlotLayer

RECOMPILES = 64  # a layer is compiled once for each number of rows


class CompiledLayers:
    """A context in which decoder layers run compiled, each with its own part of `cache`.

    A layer finds its part of the cache by its number. With the same number for all, the layers are
    equal to the compiler, which compiles one of them. Compiling a whole model would take as many
    times as long as it has layers.
    """

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self.cache: SlotCache | None = None
        self._forwards = [torch.compile(layer.forward, dynamic=False) for layer in layers]
        modules = [module for layer in layers for module in layer.modules()]
        numbered = [
            module for module in modules if isinstance(getattr(module, "layer_idx", None), int)
        ]
        self._numbers = [(module, module.layer_idx) for module in numbered]
        self._limit = torch._dynamo.config.patch(recompile_limit=RECOMPILES)

    def __enter__(self) -> None:
        for module, _ in self._numbers:
            module.layer_idx = 0
        for layer, forward, slots in zip(self.layers, self._forwards, self.cache.layers):
            layer.forward = _with_slots(forward, self.cache, slots)
        self._limit.__enter__()

    def __exit__(self, *error) -> None:
        self._limit.__exit__(*error)
        for layer in self.layers:
            del layer.forward  # the instance's, so that the class's is used again
        for module, number in self._numbers:
            module.layer_idx = number


def _with_slots(forward, cache: SlotCache, slots: SlotLayer):
    """Wrap `forward` to receive one layer's part in place of the whole cache."""

    def call(*args, **kwargs):
        args = [slots if arg is cache else arg for arg in args]
        return forward(
            *args, **{key: slots if arg is cache else arg for key, arg in kwargs.items()}
        )

    return call
