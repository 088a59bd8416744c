"""Bytes of activations: what a forward pass keeps for backward, and what both need while they run.

They are counted from transformers' modules with scaled-dot-product attention, which keeps queries,
keys, values and its output but no matrix of scores. docs/performance/memory.md compares predictions
with measurements.
"""

from collections.abc import Callable

from dschat.algorithms.logprobs import CHUNK_ELEMENTS
from dschat.memory.model_size import ModelSize

# Families whose predictions were compared with measurements.
MEASURED = ("opt", "gpt2", "gpt_neox", "llama", "qwen2", "mistral")


def layer_bytes(size: ModelSize, *, width: int) -> float:
    """Return the bytes per token that one decoder layer keeps for backward.

    Args:
        size: of the model.
        width: bytes of an element, 2 or 4.
    """
    known: dict[str, Callable] = {"opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox}
    # Other families are counted as Llama, whose layer keeps the most.
    return known.get(size.family, _llama)(size, width) + width * size.lora_width + 4 * size.heads


def _opt(size: ModelSize, width: int) -> float:
    # LayerNorm's input and output, twice; queries, keys, values; the outputs of attention and ReLU.
    kept = 8 * size.hidden + size.intermediate
    masks = 2 * size.hidden if size.dropout else 0  # two dropouts, one byte per element
    return width * kept + masks


def _gpt2(size: ModelSize, width: int) -> float:
    # As OPT, but transformers computes GELU in five steps, all of which are kept.
    masks = 2 * size.hidden if size.dropout else 0
    return width * (8 * size.hidden + 5 * size.intermediate) + masks


def _gpt_neox(size: ModelSize, width: int) -> float:
    # Both LayerNorms read the same input; GELU keeps its input and its output.
    return width * (7 * size.hidden + 2 * size.intermediate)


def _llama(size: ModelSize, width: int) -> float:
    # RMSNorm, twice: its input in fp32, the output, and the normalized input if its weight trains.
    norm = 4 * size.hidden + width * size.hidden * (2 if size.trains_norms else 1)
    # Queries, keys and values (repeated to all heads) and attention's output; gate, SiLU, up and
    # their product.
    return 2 * norm + width * (4 * size.hidden + 4 * size.intermediate)


def kept_bytes(size: ModelSize, *, tokens: int, width: int, checkpointing: bool) -> float:
    """Return the bytes kept by all layers that backward passes through.

    Args:
        size: of the model.
        tokens: of the batch, with padding.
        width: bytes of an element.
        checkpointing: keep only each layer's input.
    """
    per_layer = width * size.hidden if checkpointing else layer_bytes(size, width=width)
    ends = (4 + 3 * width) * size.hidden  # the first hidden state, and the last norm
    # A layer with adapted experts computes with copies of their weights, and makes one more.
    copies = 2 if checkpointing else size.trained_layers + 1
    experts = copies * width * size.adapted_experts / max(size.layers, 1)
    return tokens * (size.trained_layers * per_layer + ends) + experts


def packed_mask_bytes(
    size: ModelSize, *, rows: int, length: int, width: int, checkpointing: bool
) -> float:
    """Return the bytes of the block-diagonal masks of packed rows.

    The model's mask is boolean; the attention of each layer keeps a copy of it in `width`.

    Args:
        size: of the model.
        rows: of the batch.
        length: tokens of a row.
        width: bytes of an element.
        checkpointing: only one layer's copy exists at a time.
    """
    copies = 1 if checkpointing else size.trained_layers
    return rows * length**2 * (1 + copies * width)


def working_bytes(size: ModelSize, *, tokens: int, width: int, checkpointing: bool) -> float:
    """Return the most bytes that one layer needs in addition in backward.

    These are gradients, and the activations that checkpointing recomputes.
    """
    gradients = width * (2 * size.hidden + 3 * size.intermediate)
    recomputed = layer_bytes(size, width=width) if checkpointing else 0
    return tokens * (gradients + recomputed)


def inference_bytes(size: ModelSize, *, tokens: int, width: int, split: int = 1) -> float:
    """Return the most bytes that a forward pass without backward needs.

    Args:
        size: of the model.
        tokens: of the batch, with padding.
        width: bytes of an element.
        split: ranks that share the feed-forward part's columns.
    """
    return tokens * (width * (3 * size.hidden + 3 * size.intermediate / split) + 4 * size.hidden)


def loss_bytes(elements: int, *, width: int, sliced: bool, backward: bool) -> float:
    """Return the bytes of logits and their logprobs; see dschat/algorithms/logprobs.py.

    Args:
        elements: of the logits, [B, T, V].
        width: bytes of an element.
        sliced: the response's logits are a slice, which is copied.
        backward: the logits are differentiated.
    """
    chunk = min(elements, CHUNK_ELEMENTS)
    logits = width * elements * (2 if sliced else 1)
    # Forward: six fp32 copies of a chunk, and a mask.
    most = (6 * 4 + 1) * chunk
    if backward:
        # Four of them again, and gradients in `width`: each chunk's, and all of them together.
        most = max(most, (4 * 4 + 1) * chunk + 2 * width * elements)
    return logits + most


def kl_bytes(elements: int, *, width: int) -> float:
    """Return the bytes of the exact KL of two models.

    These are both logits, copies of their slices, and a chunk in fp32.

    Args:
        elements: of one model's logits, [B, R + 1, V].
        width: bytes of an element.
    """
    return 4 * width * elements + 20 * min(elements, CHUNK_ELEMENTS)
