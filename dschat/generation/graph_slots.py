"""Slots on a GPU: a step of all slots, with sampling and bookkeeping, is one CUDA graph.

The host runs a few steps ahead of the device, and learns from copies that have arrived by then
which responses have ended. A slot so waits at most that many steps for a newcomer, and no step
waits for the host.

Keys and values are in pages. If none is free, the newest response gives up its own, and continues
from its tokens later.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn
from transformers import GenerationConfig

from dschat.generation.cuda_graphs import AHEAD, SMALLEST, StepGraphs, check_step
from dschat.generation.kernels.attention import PAGE
from dschat.generation.kernels.linear import plain_products
from dschat.generation.packed_prefill import MAX_TEXTS, MAX_TOKENS, PackedPrefill
from dschat.generation.pages import SPARE, PagedCache, PageTable, pages_for, place
from dschat.generation.sampling import Sampler, keep_tokens
from dschat.generation.slots import FREE, ResponseQueue, SlotDecoder, SlotState, by_layer
from dschat.generation.tensor_parallel import TensorGroup
from dschat.models.forward import takes_position_ids
from dschat.models.structure import cache_argument

# Newcomers leave this share of the pages free, for the slots that are busy.
RESERVE = 16


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
        cache_tokens: int = 0,
        group: TensorGroup | None = None,
    ):
        """
        Args:
            model: the replica's module; its attention becomes decode_attention's.
            slots: most responses that decode together.
            compiled: run each decoder layer of a decode step through torch.compile.
            max_length: tokens of a prompt and its response, for the size of the cache; more is
                allocated if a call needs it.
            cache_tokens: positions of the cache, rounded up to pages, for all slots together; at
                least one response's. 0: all slots may hold the longest response.
            group: see ``GraphDecoder``.
        """
        super().__init__(model, slots=slots, agree=keep_tokens if group is None else group.agree)
        self.group = group
        self.graphs = StepGraphs(model, compiled=compiled, group=group)
        # Ranks of a group would have to capture at the same time.
        self.prefills = PackedPrefill(
            model, self.graphs, window=self.window, captures=group is None
        )
        self.max_length = max_length
        self.cache_tokens = cache_tokens
        self.addresses: tuple[int, ...] = ()  # of the replica's weights now
        self._unchecked = False  # no captured step has been compared with a plain one
        self._logits_seen = torch.empty(0)  # [N, V], of the last step
        self._flags = torch.empty(0)
        self._events = [torch.cuda.Event() for _ in range(AHEAD)]
        self._sizes: list[int] = []
        self._pages: PageTable | None = None
        # Of each slot: the tokens of its text when it was filled, less the steps before that; and
        # the most positions that it can need.
        self._offsets: list[int] = []
        self._most: list[int] = []
        self._prefills: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # start and end

    def decode(self, batches, generation: GenerationConfig, *, seed: int):
        """Generate as ``SlotDecoder.decode`` does.

        Raises:
            GraphMismatch: a step fails, or does not compute what a plain step does.
        """
        self._prefills.clear()
        decoded = super().decode(batches, generation, seed=seed)
        # The device has done all work by now: super() has read the responses' lengths.
        self.stats.prefill_s = sum(a.elapsed_time(b) for a, b in self._prefills) / 1000
        self.stats.pages_used = self._pages.most_used / (self._pages.num_pages - 1)
        return decoded

    def release(self) -> None:
        """Free graphs, cache and buffers. The next call allocates them again."""
        self.graphs.release()
        self.prefills.clear()
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
        device = queue.device
        key = self.graphs.fresh_key(generation, self.addresses, device)
        if key is not None:
            self.release()
            self.sampler = Sampler(generation, device, self.agree)
            self.graphs.key = key
            self._unchecked = True
        num_new = generation.max_new_tokens
        self.max_length = max(self.max_length, queue.longest + num_new)
        per_slot = pages_for(self.max_length)
        pages = self.slots * per_slot
        if self.cache_tokens:
            pages = min(pages, max(per_slot, pages_for(self.cache_tokens)))
        if self._pages is not None and self._pages.table.shape[1] < per_slot:
            self._clear_graphs()
            self.cache = self.state = None
        self._pages = PageTable(pages=pages + 1, slots=self.slots, pages_per_slot=per_slot)
        self._offsets = [0] * rows
        self._most = [0] * rows
        if self.state is None or len(self.state.tokens) <= queue.num_responses:
            self._clear_graphs()
            self.state = SlotState.allocate(
                slots=self.slots,
                responses=queue.num_responses,
                num_new=num_new,
                device=device,
                pages=per_slot,
            )
        self.state.reset(seed=seed, pad_token_id=generation.pad_token_id)
        if self._flags.shape != (AHEAD, self.slots):
            self._flags = torch.zeros(
                AHEAD, self.slots, dtype=torch.bool, pin_memory=torch.cuda.is_available()
            )
        self._sizes = sorted({-(-rows // divisor) for divisor in (1, 2, 4, SMALLEST)})

    def _clear_graphs(self) -> None:
        """Free the graphs, whose buffers are about to change."""
        self.graphs.clear()
        self.prefills.clear()

    def _step(self, rows: int) -> None:
        """Replay the graph of one step, and have the flags of what has ended copied to the host."""
        if self._pages.changed:
            table = self._send(self._pages.table)
            self.state.bounds[:, 0, 0, 2:] = table
            self._pages.changed = False
        expected = self._plain_step(rows) if self._unchecked else None
        graph = self.graphs.get(
            rows,
            step=self._advance,
            prepare=self._point_at_the_spare_page,
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

    def _point_at_the_spare_page(self) -> None:
        """Let all slots write to the page that no response has."""
        self.state.bounds[..., 0] = 0
        self.state.bounds[..., 1] = 1
        self.state.bounds[..., 2:] = SPARE
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

    def _cache_for(self, shapes) -> PagedCache:
        """Return the cache, allocated at first use from the keys and values of a prefill.

        The buffer of logits, which has its dtype, comes with it.
        """
        if self.cache is None:
            self.cache = PagedCache(shapes, pages=self._pages.num_pages)
        if len(self._logits_seen) == 0:
            vocab = self.model.config.get_text_config().vocab_size
            self._logits_seen = shapes[0][0].new_zeros(self.slots, vocab)
        return self.cache

    def _open_cache(self, rows: int, *, filled: int, newest: torch.Tensor) -> None:
        """Let the first `rows` slots write their next tokens at the positions `newest` [rows]."""
        super()._open_cache(rows, filled=filled, newest=newest)
        self.cache.use_table(self.state.bounds[:, 0, 0, 2:])

    def _send(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device. Neither side waits for the other."""
        if self.state.finished.is_cuda:
            host = host.pin_memory()
        return host.to(self.state.finished.device, non_blocking=True)

    @contextlib.contextmanager
    def _prefill_clock(self) -> Iterator[None]:
        """Record a prefill's start and end on the device."""
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        yield
        events[1].record()
        self._prefills.append(events)

    def _admitted(self, queue: ResponseQueue, free: int) -> int:
        """Return how many of the next responses have room, given so many free slots."""
        room = self._pages.num_free
        if self._is_busy():
            room -= self._pages.num_pages // RESERVE
        last_prompt = None
        for count, number in enumerate(islice(queue.waiting, free)):
            length, prompt = len(queue.text(number)), queue.shared_prompt(number)
            room -= pages_for(length + AHEAD)
            if prompt is not None and prompt == last_prompt:
                room += length // PAGE  # shared with the sample before it
            last_prompt = prompt
            if room < 0:
                return count if count or self._is_busy() else 1
        return free

    def _fill(self, queue: ResponseQueue, slots: list[int], responses: list[int]) -> None:
        """Start `responses` in `slots`, with up to MAX_TOKENS tokens in a forward pass."""
        pack: list[tuple[int, int]] = []
        tokens, texts, last_prompt = 0, 0, None
        for slot, number in zip(slots, responses, strict=True):
            prompt = queue.shared_prompt(number)
            # Samples of a prompt stay together, so that they share its text and its pages.
            if prompt is None or prompt != last_prompt:
                length = len(queue.text(number))
                if pack and (tokens + length > MAX_TOKENS or texts == MAX_TEXTS):
                    self._start(queue, pack)
                    pack, tokens, texts = [], 0, 0
                tokens += length
                texts += 1
            pack.append((slot, number))
            last_prompt = prompt
        self._start(queue, pack)

    def _start(self, queue: ResponseQueue, pairs: list[tuple[int, int]]) -> None:
        """Prefill the texts of some responses in one row, and draw their next tokens.

        Samples of a prompt share its tokens in the row, and the pages that it fills.
        """
        texts: list[torch.Tensor] = []
        text_slots: list[int] = []  # the first slot of each text
        owners: dict[int, int] = {}  # the text of each prompt
        rows: list[int] = []  # the text of each response
        for slot, number in pairs:
            text, prompt = queue.text(number), queue.shared_prompt(number)
            self._held[slot] = number
            self._since[slot] = self.stats.steps
            self._offsets[slot] = len(text) - self.stats.steps
            self._most[slot] = len(text) - queue.begun(number) + self.state.tokens.shape[1]
            if prompt is None or prompt not in owners:
                rows.append(len(texts))
                texts.append(text)
                text_slots.append(slot)
                if prompt is not None:
                    owners[prompt] = rows[-1]
            else:
                rows.append(owners[prompt])
                self._pages.share(slot, text_slots[rows[-1]], len(text) // PAGE)
            self._pages.grow(slot, min(len(text) + AHEAD, self._most[slot]))
        logits = self._prefill(texts, text_slots)
        self._copy_last_pages(pairs, rows, text_slots, texts)
        columns = [
            [slot for slot, _ in pairs],
            [number for _, number in pairs],
            [len(texts[row]) for row in rows],
            [queue.begun(number) for _, number in pairs],
            rows,
        ]
        slots, numbers, lengths, steps, index = self._send(torch.tensor(columns))
        self.state.bounds[slots, 0, 0, 0] = 0
        self.state.bounds[slots, 0, 0, 1] = lengths.int() + 1
        self._begin(slots, numbers, lengths, steps, logits[index])

    def _prefill(self, texts: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
        """Return the logits [n, V] after n texts, whose keys and values go to `slots`."""
        pages, offsets = [], []
        for slot, text in zip(slots, texts, strict=True):
            positions = torch.arange(len(text))
            pages.append(self._pages.table[slot].long()[positions // PAGE])
            offsets.append(positions % PAGE)
        return self.prefills.run(
            texts,
            torch.cat(pages),
            torch.cat(offsets),
            cache_for=self._cache_for,
            check=self._unchecked,
            send=self._send,
        )

    def _copy_last_pages(
        self,
        pairs: list[tuple[int, int]],
        rows: list[int],
        text_slots: list[int],
        texts: list[torch.Tensor],
    ) -> None:
        """Give each further sample of a prompt a copy of the prompt's last page.

        The pages before it are shared. The last one is not full, so answers write to it.
        """
        table = self._pages.table
        copies = []
        for (slot, _), row in zip(pairs, rows, strict=True):
            place, rest = divmod(len(texts[row]), PAGE)
            if slot != text_slots[row] and rest:
                copies.append([table[text_slots[row], place], table[slot, place]])
        if not copies:
            return
        sources, targets = self._send(torch.tensor(copies).T.contiguous())
        for layer in self.cache.layers:
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]

    def _reserve(self, queue: ResponseQueue) -> None:
        """Give every busy slot the pages of its next AHEAD steps, once in so many steps."""
        if self.stats.steps % AHEAD:
            return
        missing = self._missing()
        if sum(missing.values()) > self._pages.num_free:
            missing = self._make_room(queue)
        for slot in missing:
            self._pages.grow(slot, self._needed(slot))

    def _needed(self, slot: int) -> int:
        """Return the positions that a slot may fill in its next AHEAD steps."""
        return min(self._offsets[slot] + self.stats.steps + AHEAD, self._most[slot])

    def _missing(self) -> dict[int, int]:
        """Return how many pages each busy slot needs before its next AHEAD steps."""
        return {
            slot: self._pages.missing(slot, self._needed(slot))
            for slot, number in enumerate(self._held)
            if number != FREE
        }

    def _make_room(self, queue: ResponseQueue) -> dict[int, int]:
        """Free pages: those of responses that have ended, then those of the newest responses.

        Returns:
            ``_missing`` after that, which the free pages can meet.
        """
        finished, steps = self.state.finished.tolist(), self.state.steps.tolist()
        for slot, number in enumerate(self._held):
            if number != FREE and finished[slot]:
                self._free(slot)
        missing = self._missing()
        while sum(missing.values()) > self._pages.num_free:
            slot = min(missing, key=lambda slot: (steps[slot], -slot))
            del missing[slot]
            number = self._held[slot]
            queue.put_back(number, self.state.tokens[number, : steps[slot]].cpu())
            self.state.finished[slot] = True
            self._free(slot)
            self.stats.preempted += 1
        return missing

    def _free(self, slot: int) -> None:
        """Let a slot take another response. Until then it writes to the spare page."""
        super()._free(slot)
        self._pages.free(slot)

    def _keep_cache(self, kept: list[int], index: torch.Tensor) -> None:
        """Move the pages of the slots `kept` to the front of the table."""
        self._pages.keep(kept)
        self._offsets = [self._offsets[slot] for slot in kept]
        self._most = [self._most[slot] for slot in kept]

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
        bounds = self.state.bounds[:rows, 0, 0]
        index = place(bounds[:, 2:], bounds[:, 1] - 1)
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
