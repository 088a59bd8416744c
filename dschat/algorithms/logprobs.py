"""Token logprobs and entropy from logits, in fp32 and a few rows at a time.

A [B, T, V] tensor of fp32 logits would be the largest of the whole update (1.5 GiB for
16 x 512 x 50272), so it is never made: rows are cast chunk by chunk, and in training each chunk is
recomputed in backward. On a GPU, compiled passes do the same without writing fp32 logits at all.
"""

import functools
import itertools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

# Elements of one fp32 chunk: 64 Mi floats are 256 MiB.
CHUNK_ELEMENTS = 64 * 2**20


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logprob of each token and the entropy of each distribution.

    Args:
        logits: [B, T, V], any float type; position t predicts ``tokens[:, t]``.
        tokens: [B, T] int64.
        temperature: the logits are divided by it first, as in sampling.
        chunk_elements: the most fp32 logits held at once.

    Returns:
        logprobs [B, T] fp32 and entropy [B, T] fp32 (nats), both differentiable with respect to the
        logits.
    """
    batch, length, vocab = logits.shape
    flat_logits, flat_tokens = logits.reshape(-1, vocab), tokens.reshape(-1)
    if logits.is_cuda and _can_compile():
        logprobs, entropy = FusedLogprobs.apply(flat_logits, flat_tokens, temperature)
        return logprobs.view(batch, length), entropy.view(batch, length)
    rows = max(1, chunk_elements // vocab)
    pieces = []
    # split, not slices: the gradient of each slice would be a tensor as large as all logits.
    for chunk in zip(
        flat_logits.split(rows), flat_tokens.split(rows), itertools.repeat(temperature)
    ):
        if torch.is_grad_enabled() and logits.requires_grad:
            pieces.append(
                checkpoint(_chunk_logprobs, *chunk, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            pieces.append(_chunk_logprobs(*chunk))
    logprobs, entropy = (torch.cat(parts).view(batch, length) for parts in zip(*pieces))
    return logprobs, entropy


class FusedLogprobs(torch.autograd.Function):
    """Token logprobs and entropy in one pass over the logits forward, and one backward.

    On a GPU both passes are compiled, so that no fp32 logits are ever written. The gradient is
    written in the logits' own type.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logprobs [N] and entropy [N] of logits [N, V] and tokens [N]."""
        compute = _compiled(_fused_forward) if logits.is_cuda else _fused_forward
        logprobs, entropy, normalizer = compute(logits, tokens, temperature)
        ctx.save_for_backward(logits, tokens, entropy, normalizer)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, logprob_grad: torch.Tensor, entropy_grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the logits, given those of both results."""
        logits, tokens, entropy, normalizer = ctx.saved_tensors
        compute = _compiled(_fused_backward) if logits.is_cuda else _fused_backward
        grad = compute(
            logits, tokens, entropy, normalizer, logprob_grad, entropy_grad, ctx.temperature
        )
        return grad, None, None


@functools.cache
def _can_compile() -> bool:
    """Return whether torch.compile works on this GPU: it needs Triton and a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    return bool(compiler) and has_triton()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _fused_forward(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scaled = logits.float() / temperature
    highest = scaled.amax(-1, keepdim=True)
    normalizer = (scaled - highest).exp().sum(-1, keepdim=True).log() + highest
    all_logprobs = scaled - normalizer
    # A masked token has probability 0 and logprob -inf: its product counts as 0.
    terms = torch.where(scaled > float("-inf"), all_logprobs.exp() * all_logprobs, 0.0)
    logprobs = logits.gather(-1, tokens[:, None]).float() / temperature - normalizer
    return logprobs.squeeze(-1), -terms.sum(-1), normalizer.squeeze(-1)


def _fused_backward(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    entropy: torch.Tensor,
    normalizer: torch.Tensor,
    logprob_grad: torch.Tensor,
    entropy_grad: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    scaled = logits.float() / temperature
    all_logprobs = scaled - normalizer[:, None]
    probs = all_logprobs.exp()
    # d logprob / d x = [token] - p, and d H / d x = -p (log p + H).
    is_token = torch.arange(logits.shape[-1], device=logits.device) == tokens[:, None]
    grad = (is_token.float() - probs) * logprob_grad[:, None]
    spread = torch.where(probs > 0, all_logprobs + entropy[:, None], 0.0)
    grad = grad - probs * spread * entropy_grad[:, None]
    return (grad / temperature).to(logits.dtype)


def full_kl(
    logits: torch.Tensor, ref_logits: torch.Tensor, *, chunk_elements: int = CHUNK_ELEMENTS
) -> torch.Tensor:
    """Compute the exact KL(p || ref) over the whole vocabulary at each position.

    Args:
        logits: [B, T, V], any float type.
        ref_logits: [B, T, V], any float type.
        chunk_elements: the most fp32 logits of each model held at once.

    Returns:
        [B, T] fp32, nats.
    """
    batch, length, vocab = logits.shape
    rows = max(1, chunk_elements // vocab)
    pairs = zip(logits.reshape(-1, vocab).split(rows), ref_logits.reshape(-1, vocab).split(rows))
    return torch.cat([_chunk_kl(p, q) for p, q in pairs]).view(batch, length)


def _chunk_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float() / temperature
    all_logprobs = scaled - scaled.logsumexp(-1, keepdim=True)
    logprobs = all_logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    # H = -sum p log p. A masked token has p = 0 and log p = -inf: its product counts as 0, in
    # backward too.
    finite = all_logprobs.clamp(min=torch.finfo(torch.float32).min)
    return logprobs, -(all_logprobs.exp() * finite).sum(-1)


def _chunk_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    p, q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    probs = p.exp()
    # A token that the policy cannot sample adds 0, even if the reference cannot sample it either
    # (-inf - -inf).
    return torch.where(probs > 0, probs * (p - q), torch.zeros_like(probs)).sum(-1)
