"""Random seeds and the states of the random generators."""

import random

import torch


def seed_everything(seed: int) -> None:
    """Seed Python and torch; processes draw differently, but weights made from scratch must not."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, torch.Tensor], dict]:
    """The states of Python's and torch's generators: tensors, and the rest as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": random.getstate()}


def set_random_state(tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Become what ``random_state`` was taken of."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
