"""Sampling: transformers' logits processors, then the most likely token or a random draw."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dschat.generation.kernels.sample import draw, exponential_noise, triton

Agree = Callable[[torch.Tensor], torch.Tensor]


def keep_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Return `tokens` unchanged: a single rank agrees with itself."""
    return tokens


class Sampler:
    """A callable from logits [B, V] to tokens [B], by the settings of one GenerationConfig.

    It does not synchronize with the host, so a CUDA graph can hold it.
    """

    def __init__(
        self, generation: GenerationConfig, device: torch.device, agree: Agree = keep_tokens
    ):
        """
        Args:
            generation: sampling settings.
            device: of the logits.
            agree: makes the tokens [B] that ranks have drawn for the same rows equal on all ranks.

        Raises:
            ValueError: beam search, which an inference replica does not support.
        """
        if (generation.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams {generation.num_beams}: the Hybrid Engine samples, "
                "or takes the likeliest token."
            )
        self.agree = agree
        self.do_sample = bool(generation.do_sample)
        self.temperature = (
            generation.temperature if self.do_sample and generation.temperature else 1.0
        )
        self.min_new_tokens = generation.min_new_tokens or 0
        self.eos = torch.tensor(eos_ids(generation), device=device, dtype=torch.long)
        # The order of transformers' generate: penalty, barred ends, warpers.
        penalty = generation.repetition_penalty
        self.penalty = None if penalty in (None, 1.0) else RepetitionPenaltyLogitsProcessor(penalty)
        self.warpers = LogitsProcessorList()
        if self.do_sample:
            if self.temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(self.temperature))
            if generation.top_k:
                self.warpers.append(TopKLogitsWarper(generation.top_k))
            if generation.top_p is not None and generation.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(generation.top_p))
        changed = (
            self.penalty is not None
            or self.min_new_tokens
            or generation.top_k
            or (generation.top_p or 1.0) < 1.0
        )
        # The kernels return the logprob of the token that they draw, not of another rank's token.
        self.fused = triton is not None and self.do_sample and not changed and agree is keep_tokens

    def __call__(
        self,
        logits: torch.Tensor,
        texts: torch.Tensor | None,
        step: torch.Tensor | int,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the next token of each row.

        Args:
            logits: [B, V] of the last position.
            texts: [B, T], the tokens so far; only the repetition penalty reads them.
            step: number of response tokens so far, an int, or on the device an int64 scalar or one
                number for each row [B].
            noise: [B, V] fp32, standard exponential; None: drawn from torch's generator.

        Returns:
            Tokens [B] int64, and their logprobs [B] fp32. The logprobs are of the full softmax at
            the sampling temperature, which PPO's ratio needs: top-k, top-p and the repetition
            penalty do not enter.
        """
        if self.do_sample and noise is None:
            noise = torch.empty(logits.shape, device=logits.device).exponential_()
        if self.fused and logits.is_cuda:
            return draw(logits, noise, self.temperature)
        scores = logits = logits.float()
        if self.penalty is not None:
            scores = self.penalty(texts, scores)
        if self.min_new_tokens:
            barred = scores.index_fill(1, self.eos, -float("inf"))
            early = torch.as_tensor(step, device=scores.device) < self.min_new_tokens
            scores = torch.where(early.view(-1, 1), barred, scores)
        scores = self.warpers(texts, scores)
        if self.do_sample:
            # argmax(score_i + G_i) with standard Gumbel noise G = -log E, E ~ Exp(1), draws i with
            # its softmax probability.
            # torch.multinomial checks its input, which costs a synchronization on some devices.
            scores = scores - noise.log()
        tokens = scores.argmax(-1)
        tokens = self.agree(tokens)
        scaled = logits / self.temperature if self.temperature != 1.0 else logits
        logprobs = torch.log_softmax(scaled, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
        return tokens, logprobs

    def is_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a mask [B] that is True if the token ends a response."""
        return (tokens[:, None] == self.eos).any(-1)


def row_noise(
    seed: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return standard exponential noise [B, V] that depends on seed, row and step alone.

    The generator is counter-based (Philox, Salmon et al. 2011), so that no state has to follow a
    row from slot to slot. A CPU and a GPU give different numbers.

    Args:
        seed: [1] int64, at least 0.
        rows: [B] int64, the number of each row.
        steps: [B] int64, tokens that the row has drawn before.
        vocab: V.
    """
    if seed.is_cuda and triton is not None:
        return exponential_noise(seed, rows, steps, vocab)
    noise = np.empty((len(rows), vocab), dtype=np.float32)
    key = int(seed)
    for out, row, step in zip(noise, rows.tolist(), steps.tolist()):
        philox = np.random.Philox(key=[key, row], counter=[0, step, 0, 0])
        np.random.Generator(philox).standard_exponential(dtype=np.float32, out=out)
    # A noise of 0 would be the likeliest whatever its score.
    return torch.from_numpy(noise).clamp_(min=torch.finfo(torch.float32).tiny).to(seed.device)


def eos_ids(generation: GenerationConfig) -> list[int]:
    """Return the ids that end a response, as a list."""
    ids = generation.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def response_mask(tokens: torch.Tensor, eos_token_ids: Iterable[int]) -> torch.Tensor:
    """Return a mask of the response positions that count: all up to and including the first EOS.

    Lengths decide, never ``token != pad``: pad and EOS may be the same token.

    Args:
        tokens: [B, R] int64, generated tokens; those after the first EOS are arbitrary.
        eos_token_ids: the ids that end a response.

    Returns:
        [B, R] bool, True on response tokens. The EOS is an action and counts: an immediate EOS is
        a response of length 1.
    """
    ids = torch.as_tensor(list(eos_token_ids), device=tokens.device, dtype=tokens.dtype)
    is_eos = torch.isin(tokens, ids).long()
    return is_eos.cumsum(-1) - is_eos == 0
