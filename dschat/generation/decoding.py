"""Decoding with a transformers module: a prefill in groups of like length, then token by token.

Prompts are padded on the left, [N, P]. Response token r of a row is written at position P + r of
the key-value cache. This file runs on any device; cuda_graphs.py replays the steps as CUDA graphs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dschat.generation.kernels import attention
from dschat.generation.sampling import Agree, Sampler, keep_tokens
from dschat.models.families import READS_LEFT_PADDING
from dschat.models.forward import position_ids_from_mask, takes_position_ids
from dschat.models.structure import cache_argument, forward_takes
from dschat.runtime.activity import report

GROUP_TOKENS = 64  # prompts whose lengths are in one interval of so many tokens share a prefill
POLL_STEPS = 8  # steps between reads from the device whether all responses have ended
# Largest difference of logits computed in two ways, in standard deviations of the logits.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
MISSING = 0.5  # keys and values that were not written differ by 1, as cache_gap counts
COMPACT_AT = 0.75  # share of unfinished rows at which the eager loop drops the finished ones


@dataclass(frozen=True)
class Decoded:
    """Responses of N rows."""

    tokens: torch.Tensor  # [N, R] int64; padding after the first EOS
    # [N, R] fp32, of the full softmax at the sampling temperature; None if they are not known
    logprobs: torch.Tensor | None


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are allocated once.

    In a `captured` step ``update`` returns the whole buffers, so that the step serves every length,
    and decode_attention's kernel writes the new token where the row's bounds end.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.rows, self.filled = keys.shape[0], 0
        self.captured = False
        self.newest: torch.Tensor | None = None  # [rows]
        self.is_initialized = True

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Do nothing: the buffers exist."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the new tokens [rows, heads, T, width] and return what attention reads."""
        if self.captured:
            attention.newest_token.put(key_states, value_states)
            return self.keys, self.values
        return self._store(key_states, value_states)

    def _store(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what ``update`` does in a step that is not captured."""
        raise NotImplementedError

    def get_seq_length(self, *args) -> int:
        """Return the number of filled positions."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys' length with the new tokens, and the offset of the first."""
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        """Return the number of positions in the buffers."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """Return ``get_max_length``, by its name before transformers 5.2x."""
        return self.get_max_length()


class SlotLayer(StepLayer):
    """A StepLayer of buffers [N, heads, L, head width].

    In a step that is not captured, new tokens are written after the `filled` positions, or, one of
    each row, at the positions `newest`, and ``update`` returns the filled part.
    """

    def _store(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        end = self.filled + key_states.shape[2]
        if self.newest is None:
            keys[:, :, self.filled : end] = key_states
            values[:, :, self.filled : end] = value_states
        else:
            rows = torch.arange(self.rows, device=keys.device)
            keys[rows, :, self.newest] = key_states[:, :, 0]
            values[rows, :, self.newest] = value_states[:, :, 0]
        self.filled = end
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Move rows [n] of the buffers to the front, and use only these from now on."""
        self.rows = len(rows)
        for buffer in (self.keys, self.values):
            buffer[: self.rows] = buffer.index_select(0, rows)


class StepCache(Cache):
    """A StepLayer for each layer of the model."""

    layer_class: ClassVar[type[StepLayer]]

    def __init__(self, shapes: list[tuple[torch.Tensor, torch.Tensor]], *, rows: int, length: int):
        """Allocate buffers [rows, heads, length, width].

        Args:
            shapes: keys and values [*, heads, *, width] of each layer, for heads, width, dtype and
                device.
            rows: first size of the buffers.
            length: third size.
        """
        layers = []
        for pair in shapes:
            # Zeros: a masked value is still multiplied by a weight of 0, and 0 * NaN is NaN.
            buffers = [t.new_zeros(rows, t.shape[1], length, t.shape[3]) for t in pair]
            layers.append(self.layer_class(*buffers))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def start(
        self,
        *,
        rows: int,
        filled: int,
        captured: bool = False,
        newest: torch.Tensor | None = None,
    ) -> None:
        """Use the first `rows` rows, of which `filled` positions hold tokens.

        Args:
            rows: number of rows.
            filled: positions with tokens; of the longest row if `newest` is given.
            captured: see StepLayer.
            newest: [rows], the position of each row's next token, if rows differ in it.
        """
        for layer in self.layers:
            layer.rows = rows
            layer.filled = filled
            layer.captured = captured
            layer.newest = newest


class SlotCache(StepCache):
    """A SlotLayer for each layer of the model."""

    layer_class = SlotLayer

    def newest(self, *, rows: int, position: int) -> list[torch.Tensor]:
        """Return views of the keys and values [rows, heads, width] of one position, by layer."""
        return [
            buffer[:rows, :, position]
            for layer in self.layers
            for buffer in (layer.keys, layer.values)
        ]

    def fill(self, cache: Cache, slots: torch.Tensor, rows: torch.Tensor, *, end: int) -> None:
        """Copy prompts in `cache` to positions [end - T, end) of `slots`.

        Args:
            cache: a prefilled cache of prompts [n, T].
            slots: [m].
            rows: [m], the prompt of each slot, as a row of `cache`.
            end: position after the prompts.
        """
        for slot_layer, layer in zip(self.layers, cache.layers):
            start = end - layer.keys.shape[2]
            slot_layer.keys[slots, :, start:end] = layer.keys[rows]
            slot_layer.values[slots, :, start:end] = layer.values[rows]


class GraphMismatch(Exception):
    """An error: a step cannot be captured, or does not compute the same as a plain step."""


def length_groups(attention_mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield row indices [n] of prompts of similar length.

    Short prompts are then not prefilled at the length of the longest.
    """
    stretch = (attention_mask.sum(-1) - 1).clamp(min=0) // GROUP_TOKENS
    for value in stretch.unique().tolist():
        yield (stretch == value).nonzero().squeeze(-1)


def first_column(attention_mask: torch.Tensor) -> int:
    """Return the first column of a mask [n, P] that is not padding in all rows."""
    return int(attention_mask.argmax(-1).min())


def prefill(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    whole: bool = False,
) -> tuple[torch.Tensor, Cache]:
    """Return logits [n, V] of the last position and a cache of the prompts [n, P].

    Columns that are padding in all rows are left out.

    Args:
        model: the module.
        input_ids, attention_mask: [n, P].
        whole: cache all positions in layers with a sliding window, too.
    """
    start = first_column(attention_mask)
    input_ids, attention_mask = input_ids[:, start:], attention_mask[:, start:]
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids_from_mask(attention_mask)
    if forward_takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    cache = DynamicCache() if whole else DynamicCache(config=model.config)
    return model(**inputs, **{cache_argument(model): cache}).logits[:, -1], cache


def has_plain_cache(model: nn.Module) -> bool:
    """Return whether every layer caches all keys and values, without sliding windows, recurrent
    states and the like.
    """
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def cache_problem(model: nn.Module) -> str | None:
    """Return None if keys and values of whole texts are all that `model` caches, else what more.

    Sliding windows are allowed: they hide positions that a cache may hold.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "its cache holds recurrent or other states"
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return "its attention has other kinds of layers"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share keys and values"
    return None


def sliding_window(model: nn.Module) -> int | None:
    """Return how many positions layers with a sliding window attend to; None: no layer has one."""
    layers = DynamicCache(config=model.config).layers
    sizes = {layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer}
    return min(sizes) if sizes else None


def takes_graphs(model: nn.Module, *, windows: bool = False) -> str | None:
    """Return None if captured steps can run `model`, else the reason why not.

    Args:
        model: the module.
        windows: the decoder knows sliding windows.
    """
    if attention.triton is None:
        return "Triton is not installed"
    if not has_plain_cache(model) and not (windows and cache_problem(model) is None):
        return "its cache has sliding windows or other states"
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "its attention caps its scores"
    if not getattr(model, "_supports_sdpa", False):
        return "its attention cannot be exchanged"
    if has_length_dependent_rope(model):
        return "its rotary embedding depends on the longest text"
    return None


def has_length_dependent_rope(model: nn.Module) -> bool:
    """Return whether long texts embed positions differently (rope types dynamic and longrope)."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    names = [
        name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])
    ]
    return any("dynamic" in name or name == "longrope" for name in names if isinstance(name, str))


def padding_caveats(model: nn.Module) -> list[str]:
    """Return a sentence for each way in which padding or batching changes what `model` computes."""
    name = type(model).__name__
    found = []
    if model.config.get_text_config().model_type in READS_LEFT_PADDING:
        found.append(
            f"{name} reads padding on the left as text, so answers and logprobs of shorter prompts "
            "depend on the longest prompt of their batch. Give prompts of one length, or a batch "
            "size of 1."
        )
    if has_length_dependent_rope(model):
        found.append(
            f"{name} embeds positions by the longest text of a batch, so texts around the "
            "model's original context length get other logprobs in other batches. Keep "
            "--max_prompt_seq_len and --max_answer_seq_len together below that length."
        )
    return found


def decode_step(
    model: nn.Module,
    tokens: torch.Tensor,
    mask: torch.Tensor | dict[str, torch.Tensor],
    cache: Cache,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return logits [N, V] after one more token of each row.

    Args:
        model: the module.
        tokens: [N], the newest tokens.
        mask: [N, T], the attention mask of the texts with these tokens, or what else the model
            takes as a mask.
        cache: keys and values of the texts before them; receives theirs.
        positions: [N, 1], position ids of these tokens.
    """
    inputs = dict(input_ids=tokens[:, None], use_cache=True)
    # States alone have read the text already. Their layers would apply its mask to the new token.
    if not all(type(layer) is LinearAttentionLayer for layer in cache.layers):
        inputs["attention_mask"] = mask
    if takes_position_ids(model):
        inputs["position_ids"] = positions
    return model(**inputs, **{cache_argument(model): cache}).logits[:, -1]


def last_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return position ids [N, 1] of the last column of attention masks [N, T]."""
    return (mask.sum(-1, keepdim=True) - 1).clamp(min=0)


def prefill_slots(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    copies: int,
    make_cache,
) -> tuple[torch.Tensor, SlotCache]:
    """Prefill every prompt [B, P] once and copy it to `copies` slots.

    Args:
        model: the module.
        input_ids, attention_mask: [B, P], padded on the left.
        copies: slots of each prompt.
        make_cache: returns the SlotCache to use, from the keys and values of each layer of a
            prefilled group.

    Returns:
        Logits [B * copies, V] after the prompts, and the cache, whose positions [0, P) are filled.
    """
    cache, logits = None, None
    groups: Iterable[torch.Tensor] = length_groups(attention_mask)
    if has_length_dependent_rope(model):
        # It has to see the longest text of the batch, as in the training module.
        groups = [torch.arange(len(input_ids), device=input_ids.device)]
    for rows in groups:
        found, group = prefill(model, input_ids[rows], attention_mask[rows])
        if cache is None:
            cache = make_cache([(layer.keys, layer.values) for layer in group.layers])
            logits = found.new_empty(len(input_ids), found.shape[-1])
        logits[rows] = found
        slots = (rows[:, None] * copies + torch.arange(copies, device=rows.device)).view(-1)
        sources = torch.arange(len(rows), device=rows.device).repeat_interleave(copies)
        cache.fill(group, slots, sources, end=input_ids.shape[1])
    return logits.repeat_interleave(copies, dim=0), cache


def eager_decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    generation: GenerationConfig,
    agree: Agree = keep_tokens,
) -> Decoded:
    """Generate responses to prompts [B, P], with one forward pass per token.

    Finished rows are dropped from the batch once they are a quarter of it. Models with other kinds
    of caches (sliding windows) keep all rows and prefill each copy of a prompt.

    Args:
        model: the module.
        input_ids, attention_mask: [B, P], padded on the left.
        generation: sampling settings; `num_return_sequences` responses of a prompt are neighbours.
        agree: see ``Sampler``.
    """
    copies, num_new = generation.num_return_sequences or 1, generation.max_new_tokens
    sampler = Sampler(generation, input_ids.device, agree)
    plain = has_plain_cache(model)
    texts, mask = (t.repeat_interleave(copies, dim=0) for t in (input_ids, attention_mask))
    num_rows, num_prompt = texts.shape
    if plain:
        length = num_prompt + num_new
        logits, cache = prefill_slots(
            model,
            input_ids,
            attention_mask,
            copies=copies,
            make_cache=lambda shapes: SlotCache(shapes, rows=num_rows, length=length),
        )
        cache.start(rows=num_rows, filled=num_prompt)
    else:
        # The masks of later steps continue from the columns that the prefill reads.
        start = first_column(mask)
        texts, mask = texts[:, start:], mask[:, start:]
        logits, cache = prefill(model, texts, mask)
    tokens = texts.new_full((num_rows, num_new), generation.pad_token_id)
    logprobs = torch.zeros(num_rows, num_new, device=texts.device)
    rows = torch.arange(num_rows, device=texts.device)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=texts.device)
    for step in range(num_new):
        if step > 0:
            logits = decode_step(model, texts[:, -1], mask, cache, last_positions(mask))
        new, new_logprobs = sampler(logits, texts, step)
        new = torch.where(finished, generation.pad_token_id, new)
        tokens[rows, step] = new
        logprobs[rows, step] = torch.where(finished, 0.0, new_logprobs)
        finished = finished | sampler.is_end(new)
        if _poll(step, texts.device):
            live = (~finished).nonzero().squeeze(-1)
            report(answers=(num_rows - len(live), num_rows), token=(step + 1, num_new))
            if len(live) == 0:
                break
            if plain and len(live) <= COMPACT_AT * len(rows):
                rows, texts, mask, new, finished = (
                    t[live] for t in (rows, texts, mask, new, finished)
                )
                for layer in cache.layers:
                    layer.keep(live)
        texts = torch.cat([texts, new[:, None]], dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return Decoded(tokens, logprobs)


def logit_gap(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the largest difference of two logits [N, V], as a scalar to compare with TOLERANCE.

    The unit is the standard deviation of the expected logits.
    """
    return (found.float() - expected.float()).abs().max() / expected.float().std()


def cache_gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest difference of keys or values, as a scalar to compare with MISSING.

    The unit is the norm of the expected tensor of a layer. If both are zeros, the difference is 0:
    a padding token's are, in the first layer of a model that embeds it as zeros.
    """
    tiny = torch.finfo(torch.float32).tiny
    gaps = [
        (f.float() - e.float()).norm() / e.float().norm().clamp(min=tiny)
        for f, e in zip(found, expected)
    ]
    return torch.stack(gaps).max()


def _poll(step: int, device: torch.device) -> bool:
    """Return whether to check now which rows have ended.

    On a GPU this is done seldom, since it waits for the device.
    """
    return device.type == "cpu" or (step + 1) % POLL_STEPS == 0
