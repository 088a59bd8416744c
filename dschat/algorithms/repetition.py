"""Repetition inside answers."""

import torch

NGRAM = 4  # tokens
# Multiplier of a polynomial hash over 64 bits; it is odd, so that no token id loses its bits.
_MULTIPLIER = 6364136223846793005


def repeated_share(tokens: torch.Tensor, mask: torch.Tensor, *, ngram: int = NGRAM) -> torch.Tensor:
    """Return the share of an answer's n-grams that occur earlier in it, [B] float64.

    It is 1 - distinct / all n-grams, seq-rep-n of Welleck et al. 2020 (Neural text generation with
    unlikelihood training), equation 9. An answer shorter than an n-gram repeats none: 0.

    Args:
        tokens: answers [B, R], padded on the right.
        mask: [B, R]; True: a token of the answer.
        ngram: tokens in an n-gram.
    """
    rows, width = tokens.shape
    if width < ngram:
        return torch.zeros(rows, dtype=torch.float64, device=tokens.device)
    windows = tokens.unfold(1, ngram, 1)
    hashes = torch.zeros_like(windows[..., 0])
    for i in range(ngram):
        hashes = hashes * _MULTIPLIER + windows[..., i] + 1  # wraps around
    valid = mask.bool()[:, ngram - 1 :]
    # Sort by hash, n-grams of padding last, so that equal ones are neighbours.
    largest = torch.iinfo(hashes.dtype).max
    ordered = torch.where(valid, hashes, torch.full_like(hashes, largest)).sort(dim=1).values
    total = valid.sum(1)
    is_repeated = (ordered[:, 1:] == ordered[:, :-1]) & (
        torch.arange(1, ordered.shape[1], device=tokens.device) < total[:, None]
    )
    return is_repeated.sum(1).double() / total.clamp(min=1)
