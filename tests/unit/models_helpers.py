"""Miniature folders for the tests of dschat.models, made once each."""

import functools
import tempfile
from pathlib import Path

import torch

from dschat.demo.tiny_models import make_tiny_model

FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "qwen2", "mistral")
_ROOT = tempfile.TemporaryDirectory(prefix="dschat-tiny-")


@functools.cache
def tiny(family: str, *, pad_is_eos: bool = False, std: float = 0.5, overrides: tuple = ()) -> str:
    """Return the folder of a tiny model, which is read-only; `overrides` are (name, value) pairs of
    its config.
    """
    name = "-".join(
        str(part) for part in (family, pad_is_eos, std, *(f"{k}={v}" for k, v in overrides))
    )
    path = Path(_ROOT.name) / name
    return str(
        make_tiny_model(
            path, family=family, pad_is_eos=pad_is_eos, std=std, overrides=dict(overrides)
        )
    )


class ModelAsEngine(torch.nn.Module):
    """A model in the place of an engine."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


# A tiny OPT shaped like OPT-350m, unlike all others: narrow embedding, projections, post-norm
# blocks.
OPT_350M_LIKE = (("word_embed_proj_dim", 32), ("do_layer_norm_before", False))


def random_texts(lengths=(9, 5, 7), *, vocab: int = 259, seed: int = 3) -> list[torch.Tensor]:
    """Return one row of ids [T] per length, of byte tokens only (no special token)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def pad(texts: list[torch.Tensor], *, side: str, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the texts as input_ids and attention_mask [B, T], padded on `side`."""
    width = max(len(t) for t in texts)
    ids = torch.full((len(texts), width), pad_id)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        start = 0 if side == "right" else width - len(text)
        columns = slice(start, start + len(text))
        ids[row, columns] = text
        mask[row, columns] = 1
    return ids, mask


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether the difference is within `tolerance` of the largest expected magnitude."""
    return (actual - expected).abs().max().item() <= tolerance * max(
        expected.abs().max().item(), 1e-12
    )
