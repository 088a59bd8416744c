"""Stand-ins for CUDA graphs and the decode kernel, to test captured decoding without a GPU.

A graph here remembers the step that it was captured from, and the addresses of weights and buffers.
It runs the step at every replay and fails if an address has changed, because a real graph would
keep reading the old one. These stand-ins do not cover kernels and asynchronous work, which only a
GPU can get wrong; see tests/gpu.
"""

import contextlib
import weakref
from unittest import mock

import torch

from dschat.engine.hybrid_engine import HybridEngine
from dschat.generation.cuda_graphs import GraphDecoder
from dschat.generation.graph_slots import GraphSlotDecoder
from dschat.generation.kernels import attention
from dschat.generation.kernels.attention import PAGE


class Pool:
    """A pool of memory, which ends with the last graph that was captured into it."""

    def __init__(self) -> None:
        self.graphs = weakref.WeakSet()
        self.began = False


class Graph:
    """A stand-in for torch.cuda.CUDAGraph."""

    captured_now: "Graph | None" = None

    def replay(self) -> None:
        self.step()


@contextlib.contextmanager
def capture(graph: Graph, pool: Pool):
    """Record the step instead of running it; a stand-in for torch.cuda.graph."""
    assert pool.graphs or not pool.began, "the pool has ended with its last graph"
    pool.graphs.add(graph)
    pool.began = True
    Graph.captured_now = graph
    try:
        yield
    finally:
        Graph.captured_now = None


def record(decoder, rows: int, step) -> None:
    """Run `step(rows)`, or, inside ``capture``, have the graph do so at its replays."""
    if Graph.captured_now is None:
        step(rows)
        return
    held = addresses(decoder)

    def replayed() -> None:
        assert addresses(decoder) == held, "a graph holds weights or buffers that have moved"
        step(rows)

    Graph.captured_now.step = replayed


def addresses(decoder) -> list[int]:
    buffers = [tensor for layer in decoder.cache.layers for tensor in (layer.keys, layer.values)]
    return [
        tensor.data_ptr()
        for tensor in (*decoder.model.parameters(), *buffers, *vars(decoder.state).values())
    ]


class Event:
    """A stand-in for torch.cuda.Event: all work is done at once."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


class StandInDecoder(GraphDecoder):
    """A GraphDecoder with stand-in graphs."""

    def _step(self, rows: int) -> None:
        record(self, rows, super()._step)


class StandInSlotDecoder(GraphSlotDecoder):
    """A GraphSlotDecoder with stand-in graphs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        step = self.prefills._row_step
        self.prefills._row_step = lambda size, cache: record(
            self, size, lambda _: step(size, cache)
        )

    def _advance(self, rows: int) -> None:
        record(self, rows, super()._advance)


def attend(query, key, value, new_key, new_value, bounds, scale) -> torch.Tensor:
    """Compute what decode_attention's kernel does."""
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for row, (first, end, *pages) in enumerate(bounds.flatten(0, 2).tolist()):
        for cache, new in ((key, new_key), (value, new_value)):
            page, place = (pages[(end - 1) // PAGE], (end - 1) % PAGE) if pages else (row, end - 1)
            cache[page, :, place] = new[row, :, 0]
        k, v = (
            (cache[pages].transpose(0, 1).flatten(1, 2) if pages else cache[row])[:, first:end]
            .repeat_interleave(group, 0)
            .float()
            for cache in (key, value)
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
        "graph_pool_handle": Pool,
        "Event": Event,
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
    same = dict(compiled=False, group=hybrid.group)
    if hybrid.slots:
        length = options.get("max_length", 0)
        hybrid._slot_graphs = StandInSlotDecoder(
            hybrid.replica.model,
            slots=hybrid._group_slots,
            max_length=length,
            cache_tokens=hybrid._cache_tokens(length),
            **same,
        )
    else:
        hybrid._graphs = StandInDecoder(hybrid.replica.model, **same)
    return hybrid
