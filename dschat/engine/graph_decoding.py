"""Decoding on a GPU: each step, sampling included, is one CUDA graph over buffers that stay where they are.

The host only launches graphs. It runs a few steps ahead of the device and reads how many rows are left from copies that
have arrived by then, so that no step waits for it; finished rows are dropped by going over to graphs of fewer rows.
"""

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig

from dschat.engine import decode_attention
from dschat.engine.decoding import Decoded, SlotCache, SlotLayer, decode_step, has_plain_cache, prefill_slots
from dschat.engine.sampling import Sampler
from dschat.models.causal_lm import takes_position_ids
from dschat.models.structure import decoder_layers
from dschat.tracking.log import logger

AHEAD = 8  # steps that the host may be ahead of the device
SMALLEST = 8  # the smallest graph holds an eighth of the rows
LENGTH_STEP = 64  # cache lengths are multiples of it
# Largest difference of logits between a replayed step and a plain one, in standard deviations of the logits.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
RECOMPILES = 64  # each number of rows compiles a decoder layer once


@dataclass
class State:
    """The buffers that a step reads and writes; N slots, R answer tokens."""

    token: torch.Tensor  # [N, 1] int64, the newest token
    positions: torch.Tensor  # [N, 1] int64, its position id
    bounds: torch.Tensor  # [N, 1, 1, 2] int32, cache positions that a row attends to: first, and behind the newest
    position: torch.Tensor  # [1] int64, where the newest token goes in the cache
    step: torch.Tensor  # [] int64, how many answer tokens there are
    row: torch.Tensor  # [N] int64, the answer that a slot works on
    finished: torch.Tensor  # [N] bool
    remaining: torch.Tensor  # [] int64, slots that have not finished
    tokens: torch.Tensor  # [N, R] int64, the answers
    logprobs: torch.Tensor  # [N, R] fp32
    texts: torch.Tensor  # [N, T] int64, prompts and answers where the repetition penalty reads them, else [N, 0]
    logits: torch.Tensor  # [N, V], of the last step

    def take(self, slots: torch.Tensor) -> None:
        """Slots [n] move to the front."""
        for buffer in (self.token, self.positions, self.bounds, self.row, self.finished, self.texts):
            buffer[: len(slots)] = buffer[slots]


class GraphMismatch(Exception):
    """A captured step computes something else than a plain one."""


class GraphDecoder:
    """Answers of one replica, by graphs that are captured once for each number of rows.

    They hold the addresses of weights and buffers: a call with other sampling settings, longer or more answers, or
    weights elsewhere captures them anew.
    """

    def __init__(self, model: nn.Module, *, compiled: bool):
        """
        Args:
            model: the replica's module; its attention becomes decode_attention's.
            compiled: run each decoder layer of a decode step through torch.compile.
        """
        decode_attention.register()
        self.model, self.compiled = model, compiled
        model.config._attn_implementation = decode_attention.NAME
        _, self.layers = decoder_layers(model)
        self.cache: SlotCache | None = None
        self.state: State | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.capture_s = 0.0
        self.captures = 0
        self._key: tuple = ()
        self._pool = None
        self._compiled_forwards = [torch.compile(layer.forward, dynamic=False) for layer in self.layers] * compiled
        self.pad_token_id = 0
        self._counts = torch.zeros(AHEAD, dtype=torch.int64, pin_memory=True)
        self._events = [torch.cuda.Event() for _ in range(AHEAD)]

    def decode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation: GenerationConfig,
        addresses: tuple[int, ...],
    ) -> Decoded:
        """As ``decoding.eager_decode``.

        Args:
            addresses: of the replica's weights now.

        Raises:
            GraphMismatch: the first replayed step does not give a plain step's logits.
        """
        copies, num_new = generation.num_return_sequences or 1, generation.max_new_tokens
        self.pad_token_id = generation.pad_token_id
        num_rows, num_prompt = len(input_ids) * copies, input_ids.shape[1]
        sampler = Sampler(generation, input_ids.device)
        key = (num_new, generation.to_json_string(use_diff=False), addresses)

        def make_cache(shapes):
            self._prepare(shapes, num_rows, num_prompt + num_new, key, sampler)
            return self.cache

        logits, _ = prefill_slots(
            self.model, input_ids, attention_mask, copies=copies, make_cache=make_cache
        )
        input_ids, attention_mask = (t.repeat_interleave(copies, dim=0) for t in (input_ids, attention_mask))
        self._start(logits, input_ids, attention_mask, sampler)
        expected = None if key == self._key else self._plain_step(attention_mask)
        self._run(num_rows, num_new, expected)
        self._key = key
        return Decoded(self.state.tokens[:num_rows].clone(), self.state.logprobs[:num_rows].clone())

    def release(self) -> None:
        """Free graphs, cache and buffers; the next call makes them again."""
        self.graphs.clear()
        self.cache = self.state = self._pool = None
        self._key = ()

    def _prepare(self, shapes, num_rows: int, length: int, key: tuple, sampler: Sampler) -> None:
        """Cache, buffers and graphs for `num_rows` answers, kept where they fit."""
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        fits = self.cache is not None and key == self._key and num_rows in self.graphs
        if fits and length <= self.cache.layers[0].get_max_length():
            return
        held = 0 if self.cache is None else self.cache.layers[0].get_max_length()
        self.release()
        self.cache = SlotCache(shapes, rows=num_rows, length=max(length, held))
        device, slots = shapes[0][0].device, num_rows
        num_new, vocab = key[0], self.model.config.get_text_config().vocab_size
        num_texts = self.cache.layers[0].get_max_length() if sampler.penalty is not None else 0
        whole = dict(dtype=torch.int64, device=device)
        self.state = State(
            token=torch.zeros(slots, 1, **whole),
            positions=torch.zeros(slots, 1, **whole),
            bounds=torch.zeros(slots, 1, 1, 2, dtype=torch.int32, device=device),
            position=torch.zeros(1, **whole),
            step=torch.zeros((), **whole),
            row=torch.arange(slots, device=device),
            finished=torch.zeros(slots, dtype=torch.bool, device=device),
            remaining=torch.zeros((), **whole),
            tokens=torch.zeros(slots, num_new, **whole),
            logprobs=torch.zeros(slots, num_new, device=device),
            texts=torch.zeros(slots, num_texts, **whole),
            logits=torch.zeros(slots, vocab, dtype=shapes[0][0].dtype, device=device),
        )
        self._capture(num_rows, sampler)

    def _capture(self, num_rows: int, sampler: Sampler) -> None:
        """Graphs for all rows, half of them, and so on down to an eighth."""
        started = time.monotonic()
        self._pool = torch.cuda.graph_pool_handle()
        sizes = {max(1, -(-num_rows // divisor)) for divisor in (1, 2, 4, SMALLEST)}
        stream = torch.cuda.Stream()
        for rows in sorted(sizes, reverse=True):
            self._rewind()
            self.cache.start(rows=rows, filled=0, position=self.state.position)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), self._compiled_layers():
                for _ in range(2):  # compiles, and lets libraries allocate, outside of the capture
                    self._step(rows, sampler)
            torch.cuda.current_stream().wait_stream(stream)
            self._rewind()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool), self._compiled_layers():
                self._step(rows, sampler)
            self.graphs[rows] = graph
        torch.cuda.synchronize()
        self.capture_s = time.monotonic() - started
        self.captures += 1
        logger.info(
            f"Hybrid Engine: captured decode steps of {', '.join(map(str, sorted(sizes, reverse=True)))} rows "
            f"{'with' if self.compiled else 'without'} torch.compile in {self.capture_s:.1f} s; KV cache "
            f"{self.cache.nbytes / 2**30:.2f} GiB"
        )

    def _rewind(self) -> None:
        """A state in which a step may run for trial."""
        self.state.position.zero_()
        self.state.step.zero_()
        self.state.positions.zero_()
        self.state.bounds.zero_()
        self.state.bounds[..., 1] = 1

    def _step(self, rows: int, sampler: Sampler) -> None:
        """One token for the first `rows` slots; all that changes stays in the buffers."""
        s = self.state
        inputs = dict(input_ids=s.token[:rows], attention_mask=s.bounds[:rows], use_cache=True)
        if takes_position_ids(self.model):
            inputs["position_ids"] = s.positions[:rows]
        logits = self.model(**inputs, past_key_values=self.cache).logits[:, -1]
        s.logits[:rows] = logits
        new, logprobs = sampler(logits, s.texts[:rows], s.step)
        pad = s.tokens.new_full((), self.pad_token_id)
        new = torch.where(s.finished[:rows], pad, new)
        places = s.row[:rows] * s.tokens.shape[1] + s.step
        s.tokens.view(-1).index_copy_(0, places, new)
        s.logprobs.view(-1).index_copy_(0, places, torch.where(s.finished[:rows], 0.0, logprobs))
        s.finished[:rows] |= sampler.is_end(new)
        s.token[:rows] = new[:, None]
        s.positions[:rows] += 1
        s.bounds[:rows, ..., 1] += 1
        s.position += 1
        s.step += 1
        if s.texts.shape[1]:
            s.texts[:rows].index_copy_(1, s.position, new[:, None])
        s.remaining.copy_((~s.finished[:rows]).sum())

    def _start(
        self, logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, sampler: Sampler
    ) -> None:
        """Set the buffers to texts whose first answer tokens are drawn from the prefill's logits [N, V]."""
        s, num_prompt = self.state, input_ids.shape[1]
        if s.texts.shape[1]:
            s.texts[:] = input_ids[:, -1:]  # what is not there yet repeats a token that is, and so changes no penalty
            s.texts[:, :num_prompt] = input_ids
        new, logprobs = sampler(logits, s.texts, 0)
        s.tokens.fill_(self.pad_token_id)
        s.logprobs.zero_()
        s.tokens[:, 0], s.logprobs[:, 0], s.token[:, 0] = new, logprobs, new
        s.row.copy_(torch.arange(len(s.row), device=s.row.device))
        s.finished.copy_(sampler.is_end(new))
        lengths = attention_mask.sum(-1)
        s.positions[:, 0] = lengths
        s.bounds[:, 0, 0, 0] = (num_prompt - lengths).int()
        s.bounds[:, 0, 0, 1] = num_prompt + 1
        s.position.fill_(num_prompt)
        s.step.fill_(1)
        if s.texts.shape[1]:
            s.texts[:, num_prompt] = new

    def _plain_step(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of the first decode step without graph, compilation and kernels of ours."""
        self.cache.start(rows=len(attention_mask), filled=attention_mask.shape[1])
        mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=-1)
        return decode_step(self.model, self.state.token[:, 0], mask, self.cache)

    def _run(self, num_rows: int, num_new: int, expected: torch.Tensor | None) -> None:
        """Replay until all answers have ended; `expected` are the logits of the first step, to be compared."""
        rows, sizes = num_rows, sorted(self.graphs)
        for step in range(1, num_new):
            place = step % AHEAD
            if step > AHEAD:
                self._events[place].synchronize()  # of the step AHEAD steps ago
                remaining = int(self._counts[place])
                if remaining == 0:
                    break
                fitting = next(size for size in sizes if size >= remaining)
                if fitting < rows:
                    rows = fitting
                    self._compact(rows)
            self.graphs[rows].replay()
            self._counts[place].copy_(self.state.remaining, non_blocking=True)
            self._events[place].record()
            if step == 1 and expected is not None:
                self._compare(self.state.logits, expected)

    def _compact(self, rows: int) -> None:
        """The unfinished slots, and finished ones to fill up, become the first `rows`."""
        held = self.cache.layers[0].rows
        slots = torch.argsort(self.state.finished[:held].int(), stable=True)[:rows]
        self.state.take(slots)
        for layer in self.cache.layers:
            layer.keep(slots)

    @staticmethod
    def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        gap = ((found.float() - expected.float()).abs().max() / expected.float().std()).item()
        # Written so that NaN fails.
        if not gap <= TOLERANCE[expected.dtype]:
            raise GraphMismatch(f"logits differ by {gap:.3g} standard deviations")

    @contextlib.contextmanager
    def _compiled_layers(self):
        """Inside, decoder layers run compiled, each with its own part of the cache.

        All layers share one compilation: to the compiler they are alike once the number of a layer, by which it finds
        its part of the cache, is the same for all.
        """
        if not self.compiled:
            yield
            return
        numbered = [m for layer in self.layers for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        numbers = [module.layer_idx for module in numbered]
        for module in numbered:
            module.layer_idx = 0
        for layer, forward, slots in zip(self.layers, self._compiled_forwards, self.cache.layers):
            layer.forward = _with_slots(forward, self.cache, slots)
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
                yield
        finally:
            for layer in self.layers:
                del layer.forward  # the instance's; the class's is uncovered
            for module, number in zip(numbered, numbers):
                module.layer_idx = number


def _with_slots(forward, cache: SlotCache, slots: SlotLayer):
    """`forward`, given one layer's part wherever it is given the whole cache."""

    def call(*args, **kwargs):
        args = [slots if arg is cache else arg for arg in args]
        return forward(*args, **{key: slots if arg is cache else arg for key, arg in kwargs.items()})

    return call


def takes_graphs(model: nn.Module) -> str | None:
    """None where a GraphDecoder can run `model`, else why not."""
    if decode_attention.triton is None:
        return "Triton is not installed"
    if not has_plain_cache(model):
        return "its cache has sliding windows or other states"
    if not getattr(model, "_supports_sdpa", False):
        return "its attention cannot be exchanged"
    return None
