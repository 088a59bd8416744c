"""Random seeds, and the states of the random generators."""

import random
from typing import Any

import torch


def seed_everything(seed: int) -> None:
    """Seed Python and torch, the same on all ranks: new weights must be equal on all of them."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of Python's and torch's generators, as tensors and as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": random.getstate()}


def set_random_state(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Restore the states that ``random_state`` returned."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
