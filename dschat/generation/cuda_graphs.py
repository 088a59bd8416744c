"""Decoding on a GPU: each step, with sampling, is one CUDA graph over buffers at fixed addresses.

The host runs a few steps ahead of the device. It reads the number of unfinished rows from copies
that have arrived by then, so no step waits for it. Finished rows are dropped by a change to a graph
of fewer rows.
"""

import contextlib
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationConfig

from dschat.generation.compiled_layers import CompiledLayers
from dschat.generation.decoding import (
    MISSING,
    TOLERANCE,
    Decoded,
    GraphMismatch,
    SlotCache,
    cache_gap,
    decode_step,
    last_positions,
    logit_gap,
    prefill_slots,
)
from dschat.generation.graph_buffers import GraphBuffers
from dschat.generation.kernels import attention
from dschat.generation.kernels.linear import plain_products, use_plain_linears, use_skinny_linears
from dschat.generation.sampling import Sampler, keep_tokens
from dschat.generation.tensor_parallel import TensorGroup
from dschat.models.forward import takes_position_ids
from dschat.models.structure import cache_argument, decoder_layers
from dschat.runtime.activity import report
from dschat.runtime.log import logger

AHEAD = 8  # steps by which the host may be ahead of the device
SMALLEST = 8  # the smallest graph holds an eighth of the rows
LENGTH_STEP = 64  # cache lengths are multiples of it


class StepGraphs:
    """Graphs of a model's decode step, captured once for each number of rows, in one memory pool.

    They hold the addresses of weights and buffers, so they serve one `key` of settings and weights.
    """

    def __init__(self, model: nn.Module, *, compiled: bool, group: TensorGroup | None = None):
        """Let the model decode by kernels that a graph can hold.

        Args:
            model: the replica's module; its attention becomes decode_attention's.
            compiled: run its decoder layers through torch.compile.
            group: the ranks that capture together.
        """
        attention.register()
        self.model = model
        self.compiled = compiled
        self.group = group
        self._own_attention = model.config._attn_implementation
        model.config._attn_implementation = attention.NAME
        _, layers = decoder_layers(model)
        use_skinny_linears(layers)
        self.capture_s = 0.0
        self.captures = 0
        self.key: tuple = ()
        self._layers = CompiledLayers(layers) if compiled else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None

    def fresh_key(
        self, generation: GenerationConfig, addresses: tuple[int, ...], device: torch.device
    ) -> tuple | None:
        """Return the key of these settings and weights if graphs have to be captured for it.

        Args:
            generation: sampling settings.
            addresses: those of the replica's weights now.
            device: of the ranks' tensors.

        Returns:
            The key; None if it is the present one.
        """
        settings = generation.to_dict()
        settings.pop("num_return_sequences")
        key = (str(settings), addresses)
        fresh = key != self.key
        if self.group is not None:
            # Weights may have moved on one rank alone; the others capture with it.
            fresh = bool(self.group.gather(torch.tensor(fresh, device=device)).any())
        return key if fresh else None

    def get(
        self,
        rows: int,
        *,
        step: Callable[[int], None],
        prepare: Callable[[], None],
        cache,
        state,
        name: str = "",
    ) -> torch.cuda.CUDAGraph:
        """Return the graph of a step of the first `rows` slots, captured at its first use.

        Args:
            rows: slots of the step; another number that stands for it if it has a `name`.
            step: runs the step.
            prepare: sets `state` such that a step writes to nothing in the cache that is read.
            cache: the cache that the model receives in the step.
            state: a dataclass of buffers; the same after the call as before it.
            name: of the step, for the log; default: a decode step.

        Raises:
            GraphMismatch: the model or GPU does not support graphs; for example, the model has
                another attention.
        """
        if rows not in self._graphs:
            try:
                name = name or f"a decode step of {rows} rows"
                self._graphs[rows] = self._capture(rows, step, prepare, cache, state, name)
            except torch.OutOfMemoryError:
                raise
            except attention.UnfitAttention as error:
                # On all ranks of a group, which share the shapes.
                raise GraphMismatch(str(error)) from error
            except Exception as error:
                if self.group is not None:
                    raise  # the other ranks of the group may have none, and would wait
                raise GraphMismatch(f"{type(error).__name__}: {error}") from error
        return self._graphs[rows]

    def _capture(
        self,
        rows: int,
        step: Callable[[int], None],
        prepare: Callable[[], None],
        cache,
        state,
        name: str,
    ) -> torch.cuda.CUDAGraph:
        started = time.monotonic()
        if self._layers is not None:
            self._layers.cache = cache
        run_compiled = self._layers or contextlib.nullcontext()
        saved = {field: buffer.clone() for field, buffer in vars(state).items()}
        held = cache.layers[0].rows
        cache.start(rows=rows, filled=0, captured=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The draws of these steps must not count: a run that captures again, for example after it
        # has resumed, must sample the same.
        device = next(iter(saved.values())).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.cuda.stream(stream),
            run_compiled,
        ):
            # This compiles and allocates before the capture, and writes the cache's last position.
            for _ in range(2):
                prepare()
                step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool), run_compiled:
            step(rows)
        for field, buffer in saved.items():
            getattr(state, field).copy_(buffer)
        cache.start(rows=held, filled=0, captured=True)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
        self.captures += 1
        self.capture_s += seconds
        compiled = "with" if self.compiled else "without"
        logger.info(
            f"Hybrid Engine: captured {name} {compiled} torch.compile in {seconds:.1f} s"
            + (f"; KV cache {cache.nbytes / 2**30:.2f} GiB" if cache.nbytes else "")
        )
        return graph

    def clear(self) -> None:
        """Free all graphs, with their pool of memory, and let go of the cache."""
        if self._graphs:
            torch.cuda.synchronize()  # a graph must not be freed while it runs
        self._graphs.clear()
        # A pool ends with its last graph. A capture into a pool that has ended fails.
        self._pool = None
        if self._layers is not None:
            self._layers.cache = None

    def release(self) -> None:
        """Free all graphs, and forget what they were captured for."""
        attention.newest_token.clear()
        self.clear()
        self.key = ()

    def undo(self) -> None:
        """Restore the model's layers. Release the graphs first."""
        self.model.config._attn_implementation = self._own_attention
        use_plain_linears(decoder_layers(self.model)[1])


class GraphDecoder:
    """Generate with one replica, by graphs that are captured once for each number of rows.

    The graphs hold the addresses of weights and buffers. They are captured again if a call has
    other sampling settings, more or longer responses, or weights at other addresses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compiled: bool,
        max_rows: int = 0,
        max_length: int = 0,
        group: TensorGroup | None = None,
    ):
        """
        Args:
            model: the replica's module; its attention becomes decode_attention's.
            compiled: run each decoder layer of a decode step through torch.compile.
            max_rows, max_length: size of the key-value cache; more is allocated if a call needs it.
            group: the ranks that run the same steps, each with a slice of the model. Captured steps
                contain their collectives. Captures, replays and compactions depend on the tokens
                alone, which are the same on all ranks.
        """
        self.model = model
        self.group = group
        self.graphs = StepGraphs(model, compiled=compiled, group=group)
        self.max_rows = max_rows
        self.max_length = max_length
        self.cache: SlotCache | None = None
        self.state: GraphBuffers | None = None
        self.sampler: Sampler | None = None
        self.pad_token_id = 0
        self._counts = torch.zeros(AHEAD, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self._events = [torch.cuda.Event() for _ in range(AHEAD)]

    def decode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation: GenerationConfig,
        addresses: tuple[int, ...],
    ) -> Decoded:
        """Generate as ``decoding.eager_decode`` does.

        Args:
            input_ids, attention_mask: [B, P], padded on the left.
            generation: sampling settings.
            addresses: those of the replica's weights now.

        Raises:
            GraphMismatch: a step fails, or the first replayed one does not give a plain step's
                logits.
        """
        copies, num_new = generation.num_return_sequences or 1, generation.max_new_tokens
        num_rows = len(input_ids) * copies
        key = self.graphs.fresh_key(generation, addresses, input_ids.device)
        if key is not None:
            # Graphs hold the addresses of the sampler's tensors too, so it is kept as long as they.
            self.release()
            agree = keep_tokens if self.group is None else self.group.agree
            self.sampler = Sampler(generation, input_ids.device, agree)
            self.pad_token_id = generation.pad_token_id

        def make_cache(shapes):
            self._allocate(shapes, num_rows, input_ids.shape[1] + num_new, num_new)
            return self.cache

        logits, _ = prefill_slots(
            self.model, input_ids, attention_mask, copies=copies, make_cache=make_cache
        )
        input_ids, attention_mask = (
            t.repeat_interleave(copies, dim=0) for t in (input_ids, attention_mask)
        )
        self._start(logits, input_ids, attention_mask)
        expected = None
        if key is not None:
            expected = self._plain_step(attention_mask)
            self.graphs.key = key
        self._run(num_rows, num_new, expected)
        return Decoded(self.state.tokens[:num_rows].clone(), self.state.logprobs[:num_rows].clone())

    def release(self) -> None:
        """Free graphs, cache and buffers. The next call allocates them again."""
        self.graphs.release()
        self.cache = self.state = self.sampler = None

    def undo(self) -> None:
        """Free everything and restore the model's layers."""
        self.release()
        self.graphs.undo()

    def _allocate(self, shapes, num_rows: int, length: int, num_new: int) -> None:
        """Allocate cache and buffers for `num_rows` responses.

        Those that exist are kept, with their graphs, if they are large enough.
        """
        if self.cache is not None:
            held = self.cache.layers[0].keys
            if num_rows <= held.shape[0] and length <= held.shape[2]:
                return
        self.graphs.clear()
        self.max_rows = max(self.max_rows, num_rows)
        self.max_length = max(self.max_length, length)
        length = -(-self.max_length // LENGTH_STEP) * LENGTH_STEP
        self.cache = self.state = None  # freed before the new ones are allocated
        self.cache = SlotCache(shapes, rows=self.max_rows, length=length)
        self.state = GraphBuffers.allocate(
            slots=self.max_rows,
            num_new=num_new,
            # A step also writes the next token, one position after the last in the cache.
            num_text=length + 1 if self.sampler.penalty is not None else 0,
            vocab=self.model.config.get_text_config().vocab_size,
            like=shapes[0][0],
        )

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        """Return the graph of a step of the first `rows` slots, captured at its first use."""

        def prepare() -> None:
            last = self.cache.layers[0].get_max_length() - 1
            self.state.position.fill_(last)
            self.state.step.zero_()
            self.state.bounds[..., 0] = last
            self.state.bounds[..., 1] = last + 1

        return self.graphs.get(
            rows, step=self._step, prepare=prepare, cache=self.cache, state=self.state
        )

    def _step(self, rows: int) -> None:
        """Decode one token for the first `rows` slots; all results are written to the buffers."""
        s = self.state
        inputs = dict(input_ids=s.token[:rows], attention_mask=s.bounds[:rows], use_cache=True)
        if takes_position_ids(self.model):
            inputs["position_ids"] = s.positions[:rows]
        logits = self.model(**inputs, **{cache_argument(self.model): self.cache}).logits[:, -1]
        s.logits[:rows] = logits
        new, logprobs = self.sampler(logits, s.texts[:rows], s.step)
        new = torch.where(s.finished[:rows], self.pad_token_id, new)
        places = s.row[:rows] * s.tokens.shape[1] + s.step
        s.tokens.view(-1).index_copy_(0, places, new)
        s.logprobs.view(-1).index_copy_(0, places, torch.where(s.finished[:rows], 0.0, logprobs))
        s.finished[:rows] |= self.sampler.is_end(new)
        s.token[:rows] = new[:, None]
        s.positions[:rows] += 1
        s.bounds[:rows, ..., 1] += 1
        s.position += 1
        s.step += 1
        if s.texts.shape[1]:
            s.texts[:rows].index_copy_(1, s.position, new[:, None])
        s.remaining.copy_((~s.finished[:rows]).sum())

    def _start(
        self, logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> None:
        """Start the first N slots: draw the first response tokens from the prefill's logits [N, V].

        Args:
            logits: [N, V].
            input_ids, attention_mask: prompts [N, P].
        """
        s = self.state
        num_rows, num_prompt = input_ids.shape
        self.cache.start(rows=num_rows, filled=num_prompt, captured=True)
        if s.texts.shape[1]:
            # Future positions repeat a token of the prompt, which does not change the penalty.
            s.texts[:num_rows] = input_ids[:, -1:]
            s.texts[:num_rows, :num_prompt] = input_ids
        new, logprobs = self.sampler(logits, s.texts[:num_rows], 0)
        s.tokens.fill_(self.pad_token_id)
        s.logprobs.zero_()
        s.tokens[:num_rows, 0] = new
        s.logprobs[:num_rows, 0] = logprobs
        s.token[:num_rows, 0] = new
        s.row.copy_(torch.arange(len(s.row), device=s.row.device))
        s.finished[:num_rows] = self.sampler.is_end(new)
        lengths = attention_mask.sum(-1)
        s.positions[:num_rows, 0] = lengths
        s.bounds[:num_rows, 0, 0, 0] = (num_prompt - lengths).int()
        s.bounds[:num_rows, 0, 0, 1] = num_prompt + 1
        s.position.fill_(num_prompt)
        s.step.fill_(1)
        if s.texts.shape[1]:
            s.texts[:num_rows, num_prompt] = new

    def _plain_step(self, attention_mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the first decode step without graph, compilation and the kernels.

        Returns:
            Logits [N, V], and the keys and values that the step caches, by layer.
        """
        num_rows, num_prompt = attention_mask.shape
        self.cache.start(rows=num_rows, filled=num_prompt)
        mask = torch.cat([attention_mask, attention_mask.new_ones(num_rows, 1)], dim=-1)
        with plain_products():
            token = self.state.token[:num_rows, 0]
            logits = decode_step(self.model, token, mask, self.cache, last_positions(mask))
        self.cache.start(rows=num_rows, filled=num_prompt, captured=True)
        places = self.cache.newest(rows=num_rows, position=num_prompt)
        cached = [place.clone() for place in places]
        for place in places:
            place.zero_()  # so that what the captured step does not write is noticed
        return logits, cached

    def _run(self, num_rows: int, num_new: int, expected: tuple | None) -> None:
        """Replay until all responses have ended.

        Args:
            num_rows: N.
            num_new: most tokens of a response.
            expected: the result of ``_plain_step`` if the first step is to be compared with it.
        """
        sizes = sorted({-(-num_rows // divisor) for divisor in (1, 2, 4, SMALLEST)})
        rows = num_rows
        for step in range(1, num_new):
            place = step % AHEAD
            if step > AHEAD:
                self._events[place].synchronize()  # of the step AHEAD steps ago
                remaining = int(self._counts[place])
                report(answers=(num_rows - remaining, num_rows), token=(step - AHEAD + 1, num_new))
                if remaining == 0:
                    break
                fitting = next(size for size in sizes if size >= remaining)
                if fitting < rows:
                    self._compact(rows, fitting)
                    rows = fitting
            self._graph(rows).replay()
            self._counts[place].copy_(self.state.remaining, non_blocking=True)
            self._events[place].record()
            if step == 1 and expected is not None:
                self._compare(num_rows, *expected)

    def _compact(self, held: int, rows: int) -> None:
        """Move the unfinished of the first `held` slots to the first `rows` slots.

        Finished ones fill the rest.
        """
        slots = torch.argsort(self.state.finished[:held].int(), stable=True)[:rows]
        self.state.take(slots)
        for layer in self.cache.layers:
            layer.keep(slots)

    def _compare(self, num_rows: int, logits: torch.Tensor, cached: list[torch.Tensor]) -> None:
        """Compare the first replayed step with a plain one.

        Raises:
            GraphMismatch: the logits differ, or a layer has not cached the token.
        """
        found = self.cache.newest(rows=num_rows, position=int(self.state.position) - 1)
        check_step(self.state.logits[:num_rows], logits, found, cached, self.group)


def check_logits(
    found: torch.Tensor, expected: torch.Tensor, group: TensorGroup | None, *, name: str = "logits"
) -> None:
    """Compare logits [N, V] that graphs give with those of a plain forward pass.

    Args:
        found, expected: [N, V].
        group: the ranks of which all continue, or none.
        name: of the logits, for the message.

    Raises:
        GraphMismatch: they differ.
    """
    gap = logit_gap(found, expected)
    if group is not None:
        gap = group.gather(gap).max()
    # Not `gap > tolerance`, which is False for NaN.
    if not gap.item() <= TOLERANCE[expected.dtype]:
        raise GraphMismatch(f"{name} differ by {gap.item():.3g} standard deviations")


def check_step(
    logits: torch.Tensor,
    expected_logits: torch.Tensor,
    cached: list[torch.Tensor],
    expected_cached: list[torch.Tensor],
    group: TensorGroup | None,
) -> None:
    """Compare a replayed step with a plain one.

    Args:
        logits, expected_logits: [N, V].
        cached, expected_cached: keys and values of the newest tokens, by layer.
        group: the ranks of which all continue, or none.

    Raises:
        GraphMismatch: the logits differ, or a layer has not cached the token.
    """
    check_logits(logits, expected_logits, group)
    missing = cache_gap(cached, expected_cached)
    if group is not None:
        missing = group.gather(missing).max()
    if not missing.item() <= MISSING:
        raise GraphMismatch(
            f"keys and values in the cache differ by {missing.item():.3g} of their norm"
        )
