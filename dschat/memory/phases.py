"""The contents of a GPU at the worst moment of a phase, by kinds of tensors."""

from collections.abc import Mapping
from dataclasses import replace

from dschat.memory.activations import kept_bytes, loss_bytes, working_bytes
from dschat.memory.footprint import Footprint
from dschat.memory.model_size import ModelSize

# The kinds, in the order in which they are shown. Copies: what building an engine and the
# optimizer's step make.
KINDS = (
    "weights",
    "optimizer",
    "gradients",
    "buffers",
    "activations",
    "KV cache",
    "replica",
    "copies",
)
Parts = Mapping[str, float]  # kind -> bytes


def sum_parts(*parts: Parts) -> Parts:
    """Sum parts that are on the GPU at the same time."""
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in KINDS}


def largest_part(*parts: Parts) -> Parts:
    """Return the largest of parts that are on the GPU at different times."""
    return max(parts, key=lambda part: sum(part.values()))


def resident_parts(model: Footprint) -> Parts:
    """Return what a model keeps on the GPU between updates."""
    optimizer = model.master + model.adam + model.average
    return {"weights": model.weights, "optimizer": optimizer, "buffers": model.buffers}


def drop_idle_states(model: Footprint) -> Footprint:
    """Return the model without the states that --offload_idle_states moves to the host.

    These are the optimizer states and the buckets of gradients.
    """
    buckets = model.idle - model.master - model.adam
    return replace(model, master=0.0, adam=0.0, buffers=model.buffers - buckets)


def optimizer_step_parts(model: Footprint) -> Parts:
    """Return what an optimizer step needs in addition."""
    return {"gradients": model.gradients - model.freed, "copies": model.step + model.freed}


def training_phases(
    prefix: str,
    size: ModelSize,
    model: Footprint,
    system,
    *,
    tokens: int,
    logits: int,
    width: int,
    there: Parts,
    sliced: bool = False,
    masks: float = 0.0,
) -> dict[str, Parts]:
    """Return the phases of one model's backward and optimizer step.

    Args:
        logits: elements of the logits that are differentiated; 0 for a reward model.
        there: all that is there meanwhile.
        sliced: the answer's logits are a slice, which is copied.
        masks: bytes of attention masks.
    """
    checkpointing = system.gradient_checkpointing
    kept = masks + kept_bytes(size, tokens=tokens, width=width, checkpointing=checkpointing)
    working = working_bytes(size, tokens=tokens, width=width, checkpointing=checkpointing)
    loss = loss_bytes(logits, width=width, sliced=sliced, backward=True)
    backward = largest_part(
        {"gradients": model.waiting, "activations": kept + loss},
        {"gradients": model.waiting + model.early, "activations": kept + working},
        {"gradients": model.gradients + model.reduce},
    )
    return {
        f"{prefix}backward": sum_parts(there, backward),
        f"{prefix}step": sum_parts(there, optimizer_step_parts(model)),
    }
