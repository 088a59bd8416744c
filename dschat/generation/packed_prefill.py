"""Prefill of several texts in one row, straight into the pages of a cache.

Texts of unlike length need no padding in a row in which each sees itself alone. On a GPU a row is
one CUDA graph of a fixed size: a forward pass of a few prompts would otherwise wait for the host,
which takes longer to launch its kernels than they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dschat.generation.cuda_graphs import StepGraphs, check_logits
from dschat.generation.decoding import prefill
from dschat.generation.pages import SPARE, PagedCache
from dschat.generation.slots import by_layer
from dschat.models.forward import block_diagonal_mask
from dschat.models.structure import cache_argument, forward_takes

# Tokens of a captured row. Attention reads whole rows, so long ones cost more per token.
SIZES = (512, 1024)
MAX_TOKENS = SIZES[-1]  # of texts that share a row
MAX_TEXTS = 64


class RowLayer(CacheLayerMixin):
    """Keys and values [1, heads, T, width] of one layer, without a copy."""

    rows = 0

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = True

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Do nothing: ``update`` needs no buffers."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keep and return the row's keys and values."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *args) -> int:
        """Return 0: a row begins with no cache."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys' length, and the offset of the first."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class RowCache(Cache):
    """A RowLayer for each layer of the model."""

    nbytes = 0

    def __init__(self, num_layers: int):
        super().__init__(layers=[RowLayer() for _ in range(num_layers)])

    def start(self, **_) -> None:
        """Do nothing: every row begins empty."""


@dataclass
class RowBuffers:
    """The buffers of a captured row of T tokens."""

    # [4, T] int64: token ids, positions in their texts, and the pages and the positions in them to
    # which keys and values go
    tokens: torch.Tensor
    last: torch.Tensor  # [MAX_TEXTS] int64, where each text ends in the row
    logits: torch.Tensor  # [MAX_TEXTS, V] after the texts


class PackedPrefill:
    """Runs rows of texts through a model: those that fit by graphs, others as they are."""

    def __init__(self, model: nn.Module, graphs: StepGraphs, *, window: int | None, captures: bool):
        """
        Args:
            model: the module.
            graphs: holds the graphs of the rows, beside those of the decode steps.
            window: of layers with sliding windows; see ``decoding.sliding_window``.
            captures: run rows as graphs.
        """
        self.model = model
        self.graphs = graphs
        self.window = window
        self.captures = captures
        self._row: RowCache | None = None
        self._buffers: dict[int, RowBuffers] = {}

    def run(
        self,
        texts: Sequence[torch.Tensor],
        pages: torch.Tensor,
        offsets: torch.Tensor,
        *,
        cache_for,
        check: bool,
        send,
    ) -> torch.Tensor:
        """Return the logits [n, V] after n texts, whose keys and values are in their pages then.

        Args:
            texts: n times [T_i], on the host; at most MAX_TEXTS.
            pages: [T], on the host: the page of each token, for all texts.
            offsets: [T], the positions in the pages.
            cache_for: returns the PagedCache, from keys and values of each layer.
            check: compare the longest text's logits with those of the text alone. The first run of
                a graph is compared in any case.
            send: returns a device's copy of a host tensor.

        Raises:
            GraphMismatch: the row cannot be captured, or its logits differ.
        """
        lengths = torch.tensor([len(text) for text in texts])
        tokens = torch.stack(
            [
                torch.cat(list(texts)),
                torch.cat([torch.arange(length) for length in lengths]),
                pages,
                offsets,
            ]
        )
        last = lengths.cumsum(0) - 1
        size = next((size for size in SIZES if size >= tokens.shape[1]), None)
        # The first row of a cache shows the shapes of its keys and values.
        if not self.captures or size is None or self._row is None:
            self._row = RowCache(self._num_layers())
            logits = self._forward(send(tokens), send(last), one=len(texts) == 1)
            shapes = [(layer.keys, layer.values) for layer in self._row.layers]
            self._copy(cache_for(shapes), *send(tokens[2:]))
        else:
            check |= size not in self._buffers
            logits = self._replay(size, tokens, last, cache_for([]), send)[: len(texts)]
        if check:
            self._compare(logits, texts, send)
        return logits

    def clear(self) -> None:
        """Forget the buffers of all graphs, which have been freed."""
        self._buffers.clear()
        self._row = None

    def _num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    def _replay(self, size: int, tokens, last, cache: PagedCache, send) -> torch.Tensor:
        """Return the logits [MAX_TEXTS, V] of a captured row of `size` tokens."""
        if size not in self._buffers:
            like = self._row.layers[0].keys
            whole = dict(dtype=torch.int64, device=like.device)
            self._buffers[size] = RowBuffers(
                tokens=torch.zeros(4, size, **whole),
                last=torch.zeros(MAX_TEXTS, **whole),
                logits=like.new_zeros(MAX_TEXTS, self.model.config.get_text_config().vocab_size),
            )
        buffers = self._buffers[size]
        # The tokens that fill the row are one more text, whose keys and values nobody reads.
        padded = torch.zeros(4, size, dtype=torch.int64)
        padded[1] = torch.arange(size) - tokens.shape[1]
        padded[2] = SPARE
        padded[:, : tokens.shape[1]] = tokens
        ends = torch.zeros(MAX_TEXTS, dtype=torch.int64)
        ends[: len(last)] = last
        buffers.tokens.copy_(send(padded))
        buffers.last.copy_(send(ends))

        def prepare() -> None:
            buffers.tokens[2] = SPARE

        graph = self.graphs.get(
            -size,  # decode steps have positive keys
            step=lambda _: self._row_step(size, cache),
            prepare=prepare,
            cache=self._row,
            state=buffers,
            name=f"a prefill of {size} tokens",
        )
        graph.replay()
        return buffers.logits

    def _row_step(self, size: int, cache: PagedCache) -> None:
        """Run the row in the buffers of `size`, and write its results."""
        buffers = self._buffers[size]
        buffers.logits.copy_(self._forward(buffers.tokens, buffers.last))
        self._copy(cache, *buffers.tokens[2:])

    def _forward(self, tokens: torch.Tensor, last: torch.Tensor, one: bool = False) -> torch.Tensor:
        """Return logits [n, V] at the positions `last` [n] of a row `tokens` [4, T] of texts.

        Args:
            tokens: see RowBuffers.
            last: see RowBuffers.
            one: the row is one text, which needs no mask.
        """
        ids, positions = tokens[:2]
        inputs = dict(input_ids=ids[None], position_ids=positions[None], use_cache=True)
        if not one:
            inputs["attention_mask"] = self._mask(positions)
        keeps = forward_takes(self.model, "logits_to_keep")
        if keeps:
            inputs["logits_to_keep"] = last
        logits = self.model(**inputs, **{cache_argument(self.model): self._row}).logits[0]
        return logits if keeps else logits[last]

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask of a row, as the model takes it.

        Args:
            positions: [T], of the tokens in their texts.
        """
        mask = block_diagonal_mask(positions[None])
        if self.window is None:
            return mask
        places = torch.arange(len(positions), device=positions.device)
        near = mask & (places[:, None] - places < self.window)
        return by_layer(self.model, mask, near)

    def _copy(self, cache: PagedCache, pages: torch.Tensor, offsets: torch.Tensor) -> None:
        """Copy the row's keys and values to `pages` [T], at `offsets` [T] in them."""
        for paged, layer in zip(cache.layers, self._row.layers, strict=True):
            paged.keys[pages, :, offsets] = layer.keys[0].transpose(0, 1)
            paged.values[pages, :, offsets] = layer.values[0].transpose(0, 1)

    def _compare(self, logits: torch.Tensor, texts: Sequence[torch.Tensor], send) -> None:
        """Compare a row with its longest text alone.

        Raises:
            GraphMismatch: the logits differ.
        """
        longest = max(range(len(texts)), key=lambda number: len(texts[number]))
        ids = send(texts[longest])[None]
        expected, _ = prefill(self.model, ids, torch.ones_like(ids))
        found = logits[longest : longest + 1]
        check_logits(found, expected, self.graphs.group, name="logits of prompts in one row")
