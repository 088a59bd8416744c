"""Sampling from softmax(logits / temperature) in two kernels that read the logits once.

Torch's own operations take a dozen launches and write [B, V] in fp32 several times. In a small
model's decode step they cost more than a layer.
"""

import torch

from dschat.generation.kernels.limits import next_power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds do not include it
    triton = None

BLOCK = 2048  # tokens that a program reads


def draw(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row.

    argmax(score_i + G_i) with standard Gumbel noise G = -log E, E ~ Exp(1), draws i with its
    softmax probability.

    Args:
        logits: [B, V] in any floating type.
        noise: [B, V] fp32, E.
        temperature: divides the logits.

    Returns:
        Tokens [B] int64, and their logprobs [B] fp32.
    """
    logits = logits.contiguous()
    rows, vocab = logits.shape
    chunks = -(-vocab // BLOCK)
    parts = torch.empty(rows, 3, chunks, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _draw_chunk[(rows, chunks)](
        logits, noise, parts, places, temperature, vocab, CHUNKS=chunks, BLOCK=BLOCK
    )
    _join_chunks[(rows,)](
        logits, parts, places, tokens, logprobs, temperature, vocab, CHUNKS=chunks,
        PADDED=next_power_of_two(chunks), num_warps=1,
    )  # fmt: skip
    return tokens, logprobs


def exponential_noise(
    seed: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Compute ``sampling.row_noise`` on a GPU, in one kernel, which a CUDA graph can hold.

    Args:
        seed: [1] int64.
        rows: [B] int64.
        steps: [B] int64.
        vocab: V.

    Returns:
        [B, V] fp32, above 0.
    """
    rows, steps = rows.contiguous(), steps.contiguous()
    noise = torch.empty(len(rows), vocab, dtype=torch.float32, device=rows.device)
    grid = (len(rows), -(-vocab // BLOCK))
    _exponential_noise[grid](seed, rows, steps, noise, vocab, BLOCK=BLOCK)
    return noise


if triton is not None:

    @triton.jit
    def _exponential_noise(seed, rows, steps, noise, vocab, BLOCK: tl.constexpr):
        b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(rows + b).to(tl.uint32)
        step = tl.load(steps + b).to(tl.uint32)
        zeros = at.to(tl.uint32) * 0
        bits, _, _, _ = tl.philox(tl.load(seed), at.to(tl.uint32), zeros + step, zeros + row, zeros)
        # U is in (0, 1). -log(1 - U), by its series if U is small: 1 - U has 24 bits, and the most
        # likely tokens are those with the smallest noise.
        u = ((bits >> 1).to(tl.float32) + 0.5) * (1.0 / 2147483648.0)
        value = tl.where(u < 0.001, u * (1.0 + u * (0.5 + u / 3.0)), -tl.log(1.0 - u))
        tl.store(noise + b * vocab + at, value, mask=at < vocab)

    @triton.jit
    def _draw_chunk(
        logits, noise, parts, places, temperature, vocab, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        live = at < vocab
        score = (
            tl.load(logits + row * vocab + at, mask=live, other=-float("inf")).to(tl.float32)
            / temperature
        )
        gumbel = -tl.log(tl.load(noise + row * vocab + at, mask=live, other=1.0))
        best, place = tl.max(score + gumbel, 0, return_indices=True)
        # If a chunk is all -inf, its maximum must not be, or exp would receive inf - inf.
        highest = tl.maximum(tl.max(score, 0), -1e30)
        part = parts + row * 3 * CHUNKS + chunk
        tl.store(part, best)
        tl.store(part + CHUNKS, highest)
        tl.store(part + 2 * CHUNKS, tl.sum(tl.exp(score - highest), 0))
        tl.store(places + row * CHUNKS + chunk, chunk * BLOCK + place)

    @triton.jit
    def _join_chunks(
        logits,
        parts,
        places,
        tokens,
        logprobs,
        temperature,
        vocab,
        CHUNKS: tl.constexpr,
        PADDED: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.arange(0, PADDED)
        live = chunk < CHUNKS
        part = parts + row * 3 * CHUNKS + chunk
        best = tl.load(part, mask=live, other=-float("inf"))
        highest = tl.load(part + CHUNKS, mask=live, other=-1e30)
        total = tl.load(part + 2 * CHUNKS, mask=live, other=0.0)
        # NaN is not equal to any maximum, so its place might be after the last token.
        token = tl.minimum(
            tl.load(places + row * CHUNKS + tl.minimum(tl.argmax(best, 0), CHUNKS - 1)), vocab - 1
        )
        peak = tl.max(highest, 0)
        normaliser = peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))
        score = tl.load(logits + row * vocab + token).to(tl.float32) / temperature
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, score - normaliser)
