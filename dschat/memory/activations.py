"""Bytes of activations: what a forward pass keeps for backward, and what both need besides while
they run.

Counted from transformers' modules with scaled-dot-product attention, which keeps queries, keys,
values and its output
but no matrix of scores; docs/performance/memory.md holds predictions beside measurements.
"""

from collections.abc import Callable

from dschat.algorithms.logprobs import CHUNK_ELEMENTS
from dschat.memory.model_size import ModelSize


def layer_bytes(size: ModelSize, *, width: int) -> float:
    """Return the bytes a token that one decoder layer keeps for backward.

    Args:
        width: bytes of an element, 2 or 4.
    """
    known: dict[str, Callable] = {"opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox}
    # Families that are not listed are counted as Llama, whose layer keeps the most.
    return known.get(size.family, _llama)(size, width) + width * size.lora_width + 4 * size.heads


def _opt(size: ModelSize, width: int) -> float:
    # LayerNorm's input and output, twice; queries, keys, values, the attention's output; the ReLU's
    # output.
    kept = 8 * size.hidden + size.intermediate
    masks = 2 * size.hidden if size.dropout else 0  # of the two dropouts, one byte each
    return width * kept + masks


def _gpt2(size: ModelSize, width: int) -> float:
    # As OPT, but transformers writes GELU out in five kept steps.
    masks = 2 * size.hidden if size.dropout else 0
    return width * (8 * size.hidden + 5 * size.intermediate) + masks


def _gpt_neox(size: ModelSize, width: int) -> float:
    # Both LayerNorms read the same input; GELU keeps its input and its output.
    return width * (7 * size.hidden + 2 * size.intermediate)


def _llama(size: ModelSize, width: int) -> float:
    # RMSNorm, twice: its input in fp32, the output, and where its weight trains the normalised
    # input.
    norm = 4 * size.hidden + width * size.hidden * (2 if size.trains_norms else 1)
    # Queries, keys and values (repeated to all heads) and the attention's output; gate, its SiLU,
    # up, their product.
    return 2 * norm + width * (4 * size.hidden + 4 * size.intermediate)


def kept_bytes(size: ModelSize, *, tokens: int, width: int, checkpointing: bool) -> float:
    """Return the bytes kept by all layers that backward passes through.

    Args:
        tokens: of the batch, padding included.
    """
    a_layer = width * size.hidden if checkpointing else layer_bytes(size, width=width)
    ends = (4 + 3 * width) * size.hidden  # the first hidden state, and the last norm
    return tokens * (size.trained_layers * a_layer + ends)


def working_bytes(size: ModelSize, *, tokens: int, width: int, checkpointing: bool) -> float:
    """Return the most that one layer needs besides, in backward: gradients, and what checkpointing
    computes again.
    """
    gradients = width * (2 * size.hidden + 3 * size.intermediate)
    again = layer_bytes(size, width=width) if checkpointing else 0
    return tokens * (gradients + again)


def inference_bytes(size: ModelSize, *, tokens: int, width: int, split: int = 1) -> float:
    """Return the most that a forward pass without backward needs.

    Args:
        split: processes that share the feed-forward part's columns.
    """
    return tokens * (width * (3 * size.hidden + 3 * size.intermediate / split) + 4 * size.hidden)


def loss_bytes(elements: int, *, width: int, sliced: bool, backward: bool) -> float:
    """Return the bytes of logits and their logprobs; see dschat/algorithms/logprobs.py.

    Args:
        elements: of the logits, [B, T, V].
        sliced: the answer's logits are a slice, which is copied.
        backward: they are differentiated.
    """
    chunk = min(elements, CHUNK_ELEMENTS)
    logits = width * elements * (2 if sliced else 1)
    # Forward: six fp32 copies of a chunk and a mask. Backward: four of them again, and gradients in
    # `width`, each
    # chunk's and all of them together.
    forward = (6 * 4 + 1) * chunk
    return logits + max(forward, (4 * 4 + 1) * chunk + 2 * width * elements if backward else 0)


def kl_bytes(elements: int, *, width: int) -> float:
    """Return the bytes of the exact KL of two models: both logits, copies of their slices, and a
    chunk in fp32.

    Args:
        elements: of one model's logits, [B, R + 1, V].
    """
    return 4 * width * elements + 20 * min(elements, CHUNK_ELEMENTS)
