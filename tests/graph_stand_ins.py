"""Stand-ins for CUDA graphs and the decode kernel, to test captured decoding without a GPU.

A graph here remembers the step that it was captured from, and the addresses of weights and buffers.
It runs the step at every replay and fails if an address has changed, because a real graph would
keep reading the old one. These stand-ins do not cover kernels and asynchronous work, which only a
GPU can get wrong; see tests/gpu.
"""

import contextlib
from unittest import mock

import torch

from dschat.engine.hybrid_engine import HybridEngine
from dschat.generation.cuda_graphs import GraphDecoder
from dschat.generation.kernels import attention


class Graph:
    """A stand-in for torch.cuda.CUDAGraph."""

    captured_now: "Graph | None" = None

    def replay(self) -> None:
        self.step()


@contextlib.contextmanager
def capture(graph: Graph, pool=None):
    """Record the step instead of running it; a stand-in for torch.cuda.graph."""
    Graph.captured_now = graph
    try:
        yield
    finally:
        Graph.captured_now = None


class StandInDecoder(GraphDecoder):
    """A GraphDecoder with stand-in graphs."""

    def _step(self, rows: int) -> None:
        if Graph.captured_now is None:
            super()._step(rows)
            return
        held = self._places()

        def step() -> None:
            assert self._places() == held, "a graph holds weights or buffers that have moved"
            super(StandInDecoder, self)._step(rows)

        Graph.captured_now.step = step

    def _places(self) -> list[int]:
        buffers = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return [
            tensor.data_ptr()
            for tensor in (*self.model.parameters(), *buffers, *vars(self.state).values())
        ]


def attend(query, key, value, new_key, new_value, bounds, scale) -> torch.Tensor:
    """Compute what decode_attention's kernel does."""
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for row, (first, end) in enumerate(bounds.view(-1, 2).tolist()):
        for cache, new in ((key, new_key), (value, new_value)):
            cache[row, :, end - 1] = new[row, :, 0]
        k, v = (
            cache[row, :, first:end].repeat_interleave(group, 0).float() for cache in (key, value)
        )
        out[row] = ((scale * query[row].float() @ k.transpose(-1, -2)).softmax(-1) @ v).to(
            query.dtype
        )
    return out


@contextlib.contextmanager
def graphs_on_cpu():
    """Let ``with_graphs`` work without a GPU inside the context."""
    names = {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "Event": mock.Mock,
        "Stream": mock.Mock,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": mock.Mock,
        "synchronize": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(attention, "decode_attention", attend))
        yield


def with_graphs(engine, **options) -> HybridEngine:
    """Build a Hybrid Engine that decodes by graphs, not compiled; `options` are HybridEngine's."""
    hybrid = HybridEngine(engine, compiled=False, **options)
    hybrid._graphs = StandInDecoder(hybrid.replica.model, compiled=False, group=hybrid.group)
    return hybrid
