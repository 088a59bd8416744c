"""Decoding of many responses in a fixed number of slots: a slot that ends takes the next prompt.

A batch that is decoded as a whole waits for its longest response. Here responses wait in a queue,
and the others continue to decode while a newcomer's prompt is prefilled into the slot of a response
that has ended (continuous batching, Yu et al. 2022, "Orca"). What is sampled does not depend on the
number of slots: each response has its own random stream.

``SlotDecoder`` runs on any device. ``GraphSlotDecoder`` in graph_slots.py replays the same step as
a CUDA graph.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import GenerationConfig

from dschat.generation.decoding import (
    COMPACT_AT,
    GROUP_TOKENS,
    POLL_STEPS,
    Decoded,
    SlotCache,
    cache_problem,
    decode_step,
    has_length_dependent_rope,
    prefill,
    sliding_window,
)
from dschat.generation.sampling import (
    Agree,
    Sampler,
    keep_tokens,
    response_mask,
    row_noise,
)
from dschat.runtime.activity import report

REFILL_SHARE = 16  # newcomers are prefilled together once a 16th of the slots is free
FREE = -1  # the response of a slot that has none

Prompts = tuple[torch.Tensor, torch.Tensor]  # input_ids and attention_mask [B, P], left-padded


@dataclass
class SlotState:
    """The tensors of a decode step, for N slots, Q responses and at most R tokens each.

    Tokens and logprobs have one row more than responses. Slots without work write to it.
    """

    token: torch.Tensor  # [N, 1] int64, the newest token
    positions: torch.Tensor  # [N, 1] int64, its position id
    # [N, 1, 1, 2 + P] int32, the cache positions that a slot attends to: the first, and the end;
    # then the numbers of its pages, if the cache has pages
    bounds: torch.Tensor
    steps: torch.Tensor  # [N] int64, response tokens so far
    response: torch.Tensor  # [N] int64, the number of the response
    finished: torch.Tensor  # [N] bool
    seed: torch.Tensor  # [1] int64, of the random streams
    tokens: torch.Tensor  # [Q + 1, R] int64
    logprobs: torch.Tensor  # [Q + 1, R] fp32

    @classmethod
    def allocate(
        cls, *, slots: int, responses: int, num_new: int, device, pages: int = 0
    ) -> "SlotState":
        """Allocate the state of N = `slots`, Q = `responses`, R = `num_new` and P = `pages`."""
        whole = dict(dtype=torch.int64, device=device)
        # An idle slot attends to one position, so that its softmax is defined.
        bounds = torch.tensor([0, 1] + [0] * pages, dtype=torch.int32, device=device)
        return cls(
            token=torch.zeros(slots, 1, **whole),
            positions=torch.zeros(slots, 1, **whole),
            bounds=bounds.repeat(slots, 1, 1, 1),
            steps=torch.zeros(slots, **whole),
            response=torch.zeros(slots, **whole),
            finished=torch.ones(slots, dtype=torch.bool, device=device),
            seed=torch.zeros(1, **whole),
            tokens=torch.zeros(responses + 1, num_new, **whole),
            logprobs=torch.zeros(responses + 1, num_new, device=device),
        )

    def reset(self, *, seed: int, pad_token_id: int) -> None:
        """Clear all responses and free all slots."""
        self.finished.fill_(True)
        self.seed.fill_(seed)
        self.tokens.fill_(pad_token_id)
        self.logprobs.zero_()

    def move(self, slots: torch.Tensor) -> None:
        """Move slots [n] to the front."""
        for field in fields(self):
            buffer = getattr(self, field.name)
            if field.name not in ("seed", "tokens", "logprobs"):
                buffer[: len(slots)] = buffer[slots]


@dataclass
class SlotStats:
    """Counts of one rollout."""

    slots: int = 0
    responses: int = 0
    steps: int = 0
    stepped_slots: int = 0  # summed over steps, slots that a step computes
    tokens: int = 0  # response tokens
    refills: int = 0  # prefills of newcomers while other slots were busy
    preempted: int = 0  # responses that gave their pages to others, to continue later
    pages_used: float = 1.0  # largest share of the cache that was in use
    prefill_s: float = 0.0
    total_s: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return the counts as metrics."""
        # The first token of a response comes from its prefill.
        drawn = self.tokens - self.responses
        return {
            "rollout/slots": float(self.slots),
            "rollout/slots_busy": drawn / max(self.stepped_slots, 1),
            "rollout/decode_steps": float(self.steps),
            "rollout/refills": float(self.refills),
            "rollout/cache_used": self.pages_used,
            "rollout/preempted": float(self.preempted),
            "rollout/prefill_share": self.prefill_s / max(self.total_s, 1e-9),
            "rollout/tokens_per_s": self.tokens / max(self.total_s, 1e-9),
        }

    def __str__(self) -> str:
        found = self.metrics()
        return (
            f"{self.responses} answers, {self.tokens} tokens, "
            f"{found['rollout/tokens_per_s']:.0f} tokens/s; {self.slots} slots, "
            f"{100 * found['rollout/slots_busy']:.0f}% busy; cache "
            f"{100 * self.pages_used:.0f}% used, {self.preempted} answers preempted; "
            f"{self.refills} refills, prefill {100 * found['rollout/prefill_share']:.0f}% of "
            f"{self.total_s:.1f} s"
        )


class ResponseQueue:
    """Responses that wait for a slot, in the order of their prompts.

    All tensors are on the host.
    """

    def __init__(self, batches: list[Prompts], copies: int):
        """
        Args:
            batches: prompts.
            copies: responses to each prompt; they have adjacent numbers.
        """
        self.device = batches[0][0].device
        # A position that is hidden inside a prompt has no position id, so it can be left out.
        self.prompts = [
            row[mask]
            for ids, masks in batches
            for row, mask in zip(ids.cpu(), masks.bool().cpu(), strict=True)
        ]
        self.copies = copies
        self.waiting = deque(range(len(self.prompts) * copies))
        self.num_responses = len(self.waiting)
        self.longest = max(map(len, self.prompts))
        self._begun: dict[int, torch.Tensor] = {}

    def take(self, count: int) -> list[int]:
        """Remove and return the numbers of the next `count` responses, or of all that are left."""
        return [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]

    def put_back(self, response: int, tokens: torch.Tensor) -> None:
        """Let a response that has the first `tokens` [n] already wait before all others."""
        self.waiting.appendleft(response)
        self._begun[response] = tokens

    def begun(self, response: int) -> int:
        """Return the number of tokens that a response has already."""
        return len(self._begun.get(response, ()))

    def shared_prompt(self, response: int) -> int | None:
        """Return the prompt that is the whole text of a response; None if it has tokens already.

        Responses with one prompt as their text can share its prefill.
        """
        return None if response in self._begun else response // self.copies

    def text(self, response: int) -> torch.Tensor:
        """Return the prompt of a response and the tokens that it has already, [T]."""
        prompt = self.prompts[response // self.copies]
        tokens = self._begun.get(response)
        return prompt if tokens is None else torch.cat([prompt, tokens])

    def length_group(self, response: int) -> int:
        """Return a number that responses to prompts of similar length share."""
        return (len(self.prompts[response // self.copies]) - 1) // GROUP_TOKENS

    def batch(self, prompts: list[int]) -> Prompts:
        """Return the prompts [n, P], padded on the left to the longest of them."""
        longest = max(len(self.prompts[number]) for number in prompts)
        ids = self.prompts[0].new_zeros(len(prompts), longest)
        masks = torch.zeros_like(ids)
        for row, number in enumerate(prompts):
            start = longest - len(self.prompts[number])
            ids[row, start:] = self.prompts[number]
            masks[row, start:] = 1
        return ids, masks


def takes_slots(model: nn.Module, generation: GenerationConfig) -> str | None:
    """Return None if a SlotDecoder can run `model` with these settings, else the reason."""
    problem = cache_problem(model)
    if problem is not None:
        return problem
    if has_length_dependent_rope(model):
        return "its rotary embedding depends on the longest text"
    if generation.repetition_penalty not in (None, 1.0):
        return "a repetition penalty reads whole batches"
    return None


def additive(mask: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return a mask [n, T] as numbers to add to scores [n, 1, 1, T]: 0 where it is True."""
    hidden = torch.finfo(model.dtype).min
    zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return zeros.masked_fill(~mask, hidden)[:, None, None]


def by_layer(
    model: nn.Module, full: torch.Tensor, sliding: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the masks of full and sliding layers as a model with sliding windows takes them."""
    if getattr(model.config.get_text_config(), "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding  # all layers have the window


class SlotDecoder:
    """Decodes a queue of responses in slots, with one forward pass a token for all slots."""

    def __init__(self, model: nn.Module, *, slots: int, agree: Agree = keep_tokens):
        """
        Args:
            model: a module that ``takes_slots``.
            slots: most responses that decode together.
            agree: see ``Sampler``.
        """
        self.model = model
        self.slots = slots
        self.agree = agree
        self.window = sliding_window(model)
        self.cache: SlotCache | None = None
        self.state: SlotState | None = None
        self.sampler: Sampler | None = None
        self.stats = SlotStats()
        self._cache_size = (0, 0)  # slots and positions
        self._held: list[int] = []  # the response of each slot, or FREE
        self._since: list[int] = []  # the step before which a slot was filled

    def decode(
        self, batches: list[Prompts], generation: GenerationConfig, *, seed: int
    ) -> list[Decoded]:
        """Generate responses to all prompts.

        Args:
            batches: prompts.
            generation: sampling settings; `num_return_sequences` responses of a prompt are
                neighbours.
            seed: of the rollout, below 2^63. Response number i of all batches draws from a stream
                that depends on the seed and i alone.

        Returns:
            The responses, batch by batch.
        """
        started = time.monotonic()
        copies = generation.num_return_sequences or 1
        queue = ResponseQueue(batches, copies)
        rows = min(self.slots, queue.num_responses)
        self.stats = SlotStats(slots=rows, responses=queue.num_responses)
        self._prepare(queue, generation, rows, seed)
        self._held = [FREE] * rows
        self._since = [0] * rows
        self._refill(queue)
        while self._is_busy():
            self._reserve(queue)
            rows = self._shrink(rows, queue)
            self._step(rows)
            self.stats.steps += 1
            self.stats.stepped_slots += rows
            self._free_finished()
            self._refill(queue)
            self._report(queue)
        self.stats.tokens = self._num_tokens(queue.num_responses)
        self.stats.total_s = time.monotonic() - started
        sizes = [len(ids) * copies for ids, _ in batches]
        tokens = self.state.tokens[: queue.num_responses].clone().split(sizes)
        logprobs = self.state.logprobs[: queue.num_responses].clone().split(sizes)
        return [Decoded(*pair) for pair in zip(tokens, logprobs)]

    def _report(self, queue: ResponseQueue) -> None:
        """Report how many responses are known to have ended."""
        open_responses = len(queue.waiting) + len(self._held) - self._held.count(FREE)
        report(answers=(queue.num_responses - open_responses, queue.num_responses))

    def _num_tokens(self, responses: int) -> int:
        """Return the number of tokens up to the ends of the first `responses`."""
        tokens = self.state.tokens[:responses]
        return int(response_mask(tokens, self.sampler.eos.tolist()).sum())

    def _prepare(
        self, queue: ResponseQueue, generation: GenerationConfig, rows: int, seed: int
    ) -> None:
        """Set up sampler and state for `rows` slots. The cache follows with the first prefill."""
        device = queue.device
        self.sampler = Sampler(generation, device, self.agree)
        self.cache = None
        self._cache_size = (rows, queue.longest + generation.max_new_tokens)
        self.state = SlotState.allocate(
            slots=rows,
            responses=queue.num_responses,
            num_new=generation.max_new_tokens,
            device=device,
        )
        self.state.reset(seed=seed, pad_token_id=generation.pad_token_id)

    def _cache_for(self, shapes) -> SlotCache:
        """Return the cache, allocated at first use from the keys and values of a prefill."""
        if self.cache is None:
            rows, length = self._cache_size
            self.cache = SlotCache(shapes, rows=rows, length=length)
        return self.cache

    def _is_busy(self) -> bool:
        """Return whether a slot has a response that is not known to have ended."""
        return any(number != FREE for number in self._held)

    def _refill(self, queue: ResponseQueue) -> None:
        """Fill free slots from the queue, if enough are free to be worth a prefill."""
        while queue.waiting:
            free = [slot for slot, number in enumerate(self._held) if number == FREE]
            enough = max(1, len(self._held) // REFILL_SHARE)
            if len(free) < min(enough, len(queue.waiting)):
                return
            responses = queue.take(self._admitted(queue, len(free)))
            if not responses:
                return
            self.stats.refills += self._is_busy()
            with self._prefill_clock():
                self._fill(queue, free[: len(responses)], responses)
            if not self._sees_at_once():
                return
            self._free_finished()  # a first token may end its response

    def _admitted(self, queue: ResponseQueue, free: int) -> int:
        """Return how many of the next responses have room, given so many free slots."""
        return free

    def _reserve(self, queue: ResponseQueue) -> None:
        """Make room for the next step of all busy slots."""

    @contextlib.contextmanager
    def _prefill_clock(self) -> Iterator[None]:
        """Count the time of a prefill."""
        started = time.monotonic()
        yield
        self.stats.prefill_s += time.monotonic() - started

    def _fill(self, queue: ResponseQueue, slots: list[int], responses: list[int]) -> None:
        """Start `responses` in `slots`. Prompts of similar length are prefilled together."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for slot, number in zip(slots, responses):
            groups.setdefault(queue.length_group(number), []).append((slot, number))
        for pairs in groups.values():
            self._start(queue, pairs)

    def _start(self, queue: ResponseQueue, pairs: list[tuple[int, int]]) -> None:
        """Prefill the prompts of some responses, each prompt once, and draw their first tokens.

        Args:
            queue: holds the prompts.
            pairs: slot and number of each response.
        """
        owners = [number // queue.copies for _, number in pairs]
        prompts = list(dict.fromkeys(owners))
        device = queue.device
        ids, masks = (tensor.to(device) for tensor in queue.batch(prompts))
        logits, cache = prefill(self.model, ids, masks, whole=True)
        slots, numbers = (torch.tensor(column, device=device) for column in zip(*pairs))
        rows = torch.tensor([prompts.index(owner) for owner in owners], device=device)
        num_prompt = ids.shape[1]
        shapes = [(layer.keys, layer.values) for layer in cache.layers]
        self._cache_for(shapes).fill(cache, slots, rows, end=num_prompt)
        lengths = masks.sum(-1)[rows]
        self.state.bounds[slots, 0, 0, 0] = (num_prompt - lengths).int()
        self.state.bounds[slots, 0, 0, 1] = num_prompt + 1
        self._begin(slots, numbers, lengths, torch.zeros_like(numbers), logits[rows])
        for slot, number in pairs:
            self._held[slot] = number
            self._since[slot] = self.stats.steps

    def _begin(
        self,
        slots: torch.Tensor,
        numbers: torch.Tensor,
        lengths: torch.Tensor,
        steps: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Draw the next tokens of prefilled texts, and write the state of their slots.

        Args:
            slots: [n].
            numbers: [n], the responses.
            lengths: [n], tokens of the texts.
            steps: [n], response tokens in the texts.
            logits: [n, V] after the texts.
        """
        new, logprobs = self._sample(logits, numbers, steps)
        s = self.state
        s.response[slots] = numbers
        s.steps[slots] = steps + 1
        s.token[slots, 0] = new
        s.positions[slots, 0] = lengths
        s.finished[slots] = self.sampler.is_end(new) | (steps + 1 >= s.tokens.shape[1])
        s.tokens[numbers, steps] = new
        s.logprobs[numbers, steps] = logprobs

    def _sample(self, logits, numbers, steps) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose tokens [n] and their logprobs for responses [n] that have `steps` [n] tokens."""
        noise = None
        if self.sampler.do_sample:
            noise = row_noise(self.state.seed, numbers, steps, logits.shape[-1])
        return self.sampler(logits, None, steps, noise)

    def _step(self, rows: int) -> None:
        """Run a decode step of the first `rows` slots."""
        self._advance(rows)

    def _advance(self, rows: int) -> None:
        """Decode one token for the first `rows` slots; results are written to the state.

        Slots that have ended stay as they are, and write their result to the spare row.
        """
        s = self.state
        logits = self._logits(rows)
        steps = s.steps[:rows]
        new, logprobs = self._sample(logits, s.response[:rows], steps)
        going = ~s.finished[:rows]
        num_new = s.tokens.shape[1]
        spare = s.tokens.numel() - 1
        places = torch.where(going, s.response[:rows] * num_new + steps, spare)
        s.tokens.view(-1).index_copy_(0, places, new)
        s.logprobs.view(-1).index_copy_(0, places, logprobs)
        s.token[:rows, 0] = torch.where(going, new, s.token[:rows, 0])
        s.steps[:rows] += going
        s.positions[:rows, 0] += going
        s.bounds[:rows, 0, 0, 1] += going
        s.finished[:rows] |= self.sampler.is_end(new) & going | (s.steps[:rows] >= num_new)

    def _logits(self, rows: int) -> torch.Tensor:
        """Return the logits [rows, V] after the newest tokens of the first slots."""
        s = self.state
        bounds = s.bounds[:rows, 0, 0, :2].long()
        width = int(bounds[:, 1].max())
        self._open_cache(rows, filled=width - 1, newest=bounds[:, 1] - 1)
        mask = self._masks(bounds, width)
        return decode_step(self.model, s.token[:rows, 0], mask, self.cache, s.positions[:rows])

    def _open_cache(self, rows: int, *, filled: int, newest: torch.Tensor) -> None:
        """Let the first `rows` slots write their next tokens at the positions `newest` [rows]."""
        self.cache.start(rows=rows, filled=filled, newest=newest)

    def _masks(self, bounds: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the attention mask of slots with `bounds` [n, 2], as the model takes it.

        transformers derives windows from the column of the newest token, which here differs from
        slot to slot. So models with sliding windows get one mask for each kind of layer.
        """
        places = torch.arange(width, device=bounds.device)
        first, end = bounds[:, :1], bounds[:, 1:2]
        mask = (places >= first) & (places < end)
        if self.window is None:
            return mask.long()
        near = mask & (places >= end - self.window)
        return by_layer(self.model, additive(mask, self.model), additive(near, self.model))

    def _sees_at_once(self) -> bool:
        """Return whether ``_finished`` knows the last step."""
        return True

    def _finished(self) -> tuple[list[bool], int] | None:
        """Return which slots have ended, and after how many steps that was; None: not known now.

        On a GPU this is done seldom, since it waits for the device.
        """
        finished = self.state.finished
        if finished.is_cuda and self.stats.steps % POLL_STEPS:
            return None
        return finished.tolist(), self.stats.steps

    def _free_finished(self) -> None:
        """Free the slots whose responses have ended."""
        found = self._finished()
        if found is None:
            return
        finished, steps = found
        for slot, number in enumerate(self._held):
            # A slot that was filled after that step has another response by now.
            if number != FREE and finished[slot] and self._since[slot] <= steps:
                self._free(slot)

    def _free(self, slot: int) -> None:
        """Let a slot take another response."""
        self._held[slot] = FREE

    def _shrink(self, rows: int, queue: ResponseQueue) -> int:
        """Return how many slots to step, after dropping the free ones if nothing waits."""
        if queue.waiting:
            return rows
        busy = [slot for slot in range(rows) if self._held[slot] != FREE]
        if len(busy) > COMPACT_AT * rows:
            return rows
        self._compact(busy)
        return len(busy)

    def _compact(self, kept: list[int]) -> None:
        """Move the slots `kept` to the front. The others are not used any more."""
        index = torch.tensor(kept, device=self.state.finished.device)
        self.state.move(index)
        self._keep_cache(kept, index)
        self._held = [self._held[slot] for slot in kept]
        self._since = [self._since[slot] for slot in kept]

    def _keep_cache(self, kept: list[int], index: torch.Tensor) -> None:
        """Move what the slots `kept`, as a list and as `index` [n], have cached to the front."""
        for layer in self.cache.layers:
            layer.keep(index)
