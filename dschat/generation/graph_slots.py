"""Slots on a GPU: a step of all slots, with sampling and bookkeeping, is one CUDA graph.

The host runs a few steps ahead of the device, and learns from copies that have arrived by then
which responses have ended. A slot so waits at most that many steps for a newcomer, and no step
waits for the host.
"""

import torch
from torch import nn
from transformers import GenerationConfig

from dschat.generation.cuda_graphs import AHEAD, LENGTH_STEP, SMALLEST, StepGraphs, check_step
from dschat.generation.decoding import SlotCache
from dschat.generation.kernels.linear import plain_products
from dschat.generation.sampling import Sampler, keep_tokens
from dschat.generation.slots import FREE, ResponseQueue, SlotDecoder, SlotState, by_layer
from dschat.generation.tensor_parallel import TensorGroup
from dschat.models.forward import takes_position_ids
from dschat.models.structure import cache_argument


class GraphSlotDecoder(SlotDecoder):
    """A SlotDecoder whose steps are graphs, captured once for each number of slots.

    The graphs hold the addresses of weights and buffers. They are captured again if a call has
    other sampling settings, more or longer responses, or weights at other addresses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int,
        compiled: bool,
        max_length: int = 0,
        group: TensorGroup | None = None,
    ):
        """
        Args:
            model: the replica's module; its attention becomes decode_attention's.
            slots: most responses that decode together.
            compiled: run each decoder layer of a decode step through torch.compile.
            max_length: tokens of a prompt and its response, for the size of the cache; more is
                allocated if a call needs it.
            group: see ``GraphDecoder``.
        """
        super().__init__(model, slots=slots, agree=keep_tokens if group is None else group.agree)
        self.group = group
        self.graphs = StepGraphs(model, compiled=compiled, group=group)
        self.max_length = max_length
        self.addresses: tuple[int, ...] = ()  # of the replica's weights now
        self._unchecked = False  # no captured step has been compared with a plain one
        self._logits_seen = torch.empty(0)  # [N, V], of the last step
        self._flags = torch.empty(0)
        self._events = [torch.cuda.Event() for _ in range(AHEAD)]
        self._sizes: list[int] = []

    def release(self) -> None:
        """Free graphs, cache and buffers. The next call allocates them again."""
        self.graphs.release()
        self.cache = self.state = self.sampler = None
        self._logits_seen = torch.empty(0)

    def undo(self) -> None:
        """Free everything and restore the model's layers."""
        self.release()
        self.graphs.undo()

    def _prepare(
        self, queue: ResponseQueue, generation: GenerationConfig, rows: int, seed: int
    ) -> None:
        """Keep sampler, cache and state, with their graphs, if they serve this call as well."""
        device = queue.prompts[0].device
        key = self.graphs.fresh_key(generation, self.addresses, device)
        if key is not None:
            self.release()
            self.sampler = Sampler(generation, device, self.agree)
            self.graphs.key = key
            self._unchecked = True
        num_new = generation.max_new_tokens
        self.max_length = max(self.max_length, queue.longest + num_new)
        length = -(-self.max_length // LENGTH_STEP) * LENGTH_STEP
        self._cache_size = (self.slots, length)
        if self.cache is not None and self.cache.layers[0].get_max_length() < length:
            self.graphs.clear()
            self.cache = None
        if self.state is None or len(self.state.tokens) <= queue.num_responses:
            self.graphs.clear()
            self.state = SlotState.allocate(
                slots=self.slots, responses=queue.num_responses, num_new=num_new, device=device
            )
        self.state.reset(seed=seed, pad_token_id=generation.pad_token_id)
        if self._flags.shape != (AHEAD, self.slots):
            self._flags = torch.zeros(
                AHEAD, self.slots, dtype=torch.bool, pin_memory=torch.cuda.is_available()
            )
        self._sizes = sorted({-(-rows // divisor) for divisor in (1, 2, 4, SMALLEST)})

    def _step(self, rows: int) -> None:
        """Replay the graph of one step, and have the flags of what has ended copied to the host."""
        expected = self._plain_step(rows) if self._unchecked else None
        graph = self.graphs.get(
            rows,
            step=self._advance,
            prepare=self._point_at_the_end,
            cache=self.cache,
            state=self.state,
        )
        graph.replay()
        place = self.stats.steps % AHEAD
        self._flags[place].copy_(self.state.finished, non_blocking=True)
        self._events[place].record()
        if expected is not None:
            self._compare(*expected)
            self._unchecked = False

    def _point_at_the_end(self) -> None:
        """Let all slots write the last position of the cache, which no response has reached."""
        last = self.cache.layers[0].get_max_length() - 1
        self.state.bounds[..., 0] = last
        self.state.bounds[..., 1] = last + 1
        self.state.finished.fill_(True)

    def _logits(self, rows: int) -> torch.Tensor:
        """Return the logits [rows, V] after the newest tokens, by the kernel that takes bounds."""
        s = self.state
        bounds = s.bounds[:rows]
        if self.window is not None:
            bounds = by_layer(self.model, bounds, bounds)  # attention_forward knows its window
        inputs = dict(input_ids=s.token[:rows], attention_mask=bounds, use_cache=True)
        if takes_position_ids(self.model):
            inputs["position_ids"] = s.positions[:rows]
        logits = self.model(**inputs, **{cache_argument(self.model): self.cache}).logits[:, -1]
        self._logits_seen[:rows] = logits
        return logits

    def _cache_for(self, shapes) -> SlotCache:
        """Return the cache. The buffer of logits, which has its dtype, comes with it."""
        cache = super()._cache_for(shapes)
        if len(self._logits_seen) == 0:
            vocab = self.model.config.get_text_config().vocab_size
            self._logits_seen = shapes[0][0].new_zeros(self.slots, vocab)
        return cache

    def _sees_at_once(self) -> bool:
        return False

    def _finished(self) -> tuple[list[bool], int] | None:
        """Return the flags of AHEAD - 1 steps ago, which have arrived or soon will."""
        step = self.stats.steps - AHEAD  # counted from 0
        if step < 0:
            return None
        place = step % AHEAD
        self._events[place].synchronize()
        # This step has not seen slots that were filled after it.
        return self._flags[place].tolist(), step

    def _shrink(self, rows: int, queue: ResponseQueue) -> int:
        """Return how many slots to step: few sizes, so that few graphs are captured."""
        if queue.waiting:
            return rows
        busy = [slot for slot in range(rows) if self._held[slot] != FREE]
        fitting = next(size for size in self._sizes if size >= len(busy))
        if fitting < rows:
            free = [slot for slot in range(rows) if self._held[slot] == FREE]
            self._compact(busy + free[: fitting - len(busy)])
        return min(rows, fitting)

    def _compact(self, kept: list[int]) -> None:
        """Move the slots `kept` to the front."""
        super()._compact(kept)
        # Flags that are under way are in the old order.
        self._since = [self.stats.steps] * len(kept)

    def _newest(self, rows: int) -> list[tuple[torch.Tensor, tuple]]:
        """Return each layer's keys and values, with the index of the newest tokens in them."""
        newest = self.state.bounds[:rows, 0, 0, 1].long() - 1
        index = (torch.arange(rows, device=newest.device), slice(None), newest)
        return [
            (buffer, index) for layer in self.cache.layers for buffer in (layer.keys, layer.values)
        ]

    def _plain_step(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run a step without graph, compilation and the kernels.

        Returns:
            Bounds before the step, logits [rows, V], and the keys and values that it caches.
        """
        with plain_products():
            logits = super()._logits(rows)
        places = self._newest(rows)
        cached = [buffer[index].clone() for buffer, index in places]
        for buffer, index in places:
            buffer[index] = 0  # so that what the captured step does not write is noticed
        return self.state.bounds[:rows].clone(), logits, cached

    def _compare(
        self, bounds: torch.Tensor, logits: torch.Tensor, cached: list[torch.Tensor]
    ) -> None:
        """Compare a replayed step with a plain one.

        Raises:
            GraphMismatch: the logits differ, or a layer has not cached the token.
        """
        rows = len(bounds)
        now = self.state.bounds[:rows].clone()
        self.state.bounds[:rows] = bounds
        found = [buffer[index] for buffer, index in self._newest(rows)]
        self.state.bounds[:rows] = now
        check_step(self._logits_seen[:rows], logits, found, cached, self.group)
