"""What lies on a GPU at the worst moment of a phase, by kinds of tensors."""

from collections.abc import Mapping
from dataclasses import replace

from dschat.memory.activations import kept_bytes, loss_bytes, working_bytes
from dschat.memory.footprint import Footprint
from dschat.memory.model_size import ModelSize

# The kinds, in the order in which they are shown. Copies: what building an engine and the optimizer's step make.
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


def together(*parts: Parts) -> Parts:
    """All of them at the same time."""
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in KINDS}


def worst(*parts: Parts) -> Parts:
    """Of what is there at different times the largest."""
    return max(parts, key=lambda part: sum(part.values()))


def lying(model: Footprint) -> Parts:
    """What a model keeps there between the steps."""
    optimizer = model.master + model.adam + model.average
    return {"weights": model.weights, "optimizer": optimizer, "buffers": model.buffers}


def without_idle(model: Footprint) -> Footprint:
    """The model while --offload_idle_states has its states on the host: optimizer states, and buckets of gradients."""
    buckets = model.idle - model.master - model.adam
    return replace(model, master=0.0, adam=0.0, buffers=model.buffers - buckets)


def stepping(model: Footprint) -> Parts:
    """What an optimizer step needs beside what lies there."""
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
) -> dict[str, Parts]:
    """The phases of one model's backward and optimizer step.

    Args:
        logits: elements of the logits that are differentiated; 0 for a reward model.
        there: all that lies there meanwhile.
        sliced: the answer's logits are a slice, which is copied.
    """
    checkpointing = system.gradient_checkpointing
    kept = kept_bytes(size, tokens=tokens, width=width, checkpointing=checkpointing)
    working = working_bytes(size, tokens=tokens, width=width, checkpointing=checkpointing)
    loss = loss_bytes(logits, width=width, sliced=sliced, backward=True)
    backward = worst(
        {"gradients": model.waiting, "activations": kept + loss},
        {"gradients": model.waiting + model.early, "activations": kept + working},
        {"gradients": model.gradients + model.reduce},
    )
    return {
        f"{prefix}backward": together(there, backward),
        f"{prefix}step": together(there, stepping(model)),
    }
