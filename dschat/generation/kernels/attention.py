"""Attention of one new token over a static key-value cache, as a Triton kernel that reads only what
a row has.

A kernel that takes a mask reads the whole cache, however little of it is filled. This one gets
bounds [first, end) for
each row in device memory: left padding and the unfilled end are not read, and one captured CUDA
graph serves every
length. Long rows are split over several programs (Dao et al. 2023, Flash-Decoding), whose parts a
second kernel joins.
It also writes the token's key and value to the cache, which would be two launches a layer
otherwise.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dschat.generation.kernels import limits

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

NAME = "dschat_decode"
PROGRAMS = 512  # programs to aim for: four on each multiprocessor of an H100
MAX_SPLITS = 16
# Keys and values [B, K, 1, D] of the token that a decode step is at: from the cache's update, which
# gets them but sees no
# attention, to the attention right after it, which gets what the update returns.
_handed_over: list[tuple[torch.Tensor, torch.Tensor]] = []


def register() -> None:
    """Make the attention known to transformers under NAME. With anything but bounds it is
    transformers' sdpa.
    """
    limits.detect_shared_memory()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def hand_over(key: torch.Tensor, value: torch.Tensor) -> None:
    """Leave the newest token's key and value [B, K, 1, D] to the attention that comes next."""
    _handed_over.append((key, value))


def forget_handed_over() -> None:
    """Drop what no attention took: a model whose attention is another one."""
    _handed_over.clear()


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """Attend as transformers' attention functions do: query [B, H, T, D], key and value [B, K, L,
    D] to [B, T, H, D].

    Args:
        attention_mask: bounds [B, 1, 1, 2] int32 for a decode step (T = 1), whose own key and value
            were handed over and
            go into `key` and `value`; else a mask as sdpa takes it.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new_key, new_value = _handed_over.pop()
    return decode_attention(query, key, value, new_key, new_value, attention_mask, scale).transpose(
        1, 2
    ), None


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return [B, H, 1, D], softmax(scale q k') v over cache positions first <= i < end, the last of
    which is written first.

    Args:
        query: [B, H, 1, D].
        key, value: the cache, [N, K, L, D] with N >= B, H a multiple of K; the last dimension
            contiguous. Position
            end - 1 of each row becomes the new key and value.
        new_key, new_value: [B, K, 1, D].
        bounds: [B, 1, 1, 2] int32, first and end of each row; end > first.
    """
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    rows = 1 if group == 1 else max(16, limits.next_power_of_two(group))
    block, num_stages = limits.attention_block(
        rows=rows,
        width=limits.next_power_of_two(width),
        itemsize=query.element_size(),
        shared=limits.shared_bytes,
    )
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (batch * kv_heads), key.shape[2] // block))
    query = query.reshape(batch, heads, width).contiguous()
    out = torch.empty_like(query)
    parts = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=query.device)
    _attend[(batch * kv_heads, splits)](
        query,
        key,
        value,
        new_key.contiguous(),
        new_value.contiguous(),
        bounds,
        out,
        parts,
        sums,
        *key.stride()[:3],
        *value.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=rows,
        SCALE=scale * 1.4426950408889634,  # exp(x) = exp2(x log2 e), and the GPU has exp2
        WIDTH=width,
        PADDED=limits.next_power_of_two(width),
        BLOCK=block,
        SPLITS=splits,
        num_warps=1 if width <= 64 else 2,
        num_stages=num_stages,
    )
    if splits > 1:
        _join[(batch * heads,)](
            parts,
            sums,
            out,
            WIDTH=width,
            PADDED=limits.next_power_of_two(width),
            SPLITS=splits,
            num_warps=1,
        )
    return out[:, :, None]


if triton is not None:

    @triton.jit
    def _attend(
        query,
        key,
        value,
        new_key,
        new_value,
        bounds,
        out,
        parts,
        sums,
        key_b,
        key_h,
        key_l,
        value_b,
        value_h,
        value_l,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        SCALE: tl.constexpr,
        WIDTH: tl.constexpr,
        PADDED: tl.constexpr,
        BLOCK: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        b, h = (
            (tl.program_id(0) // KV_HEADS).to(tl.int64),
            (tl.program_id(0) % KV_HEADS).to(tl.int64),
        )
        split = tl.program_id(1)
        # What is read of the cache ends before the new token.
        first, newest = tl.load(bounds + 2 * b), tl.load(bounds + 2 * b + 1) - 1
        share = tl.cdiv(tl.cdiv(newest - first, SPLITS), BLOCK) * BLOCK
        first += split * share
        end = tl.minimum(newest, first + share)
        d = tl.arange(0, PADDED)
        rows = tl.arange(0, ROWS)
        heads = b * KV_HEADS * GROUP + h * GROUP + rows
        is_row = rows < GROUP
        there = is_row[:, None] & (d < WIDTH)[None, :]
        q = tl.load(query + heads[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        # The first program of a row begins with the new token, and writes it; no program reads its
        # place.
        takes = (split == 0) & (d < WIDTH)
        new_k = tl.load(new_key + (b * KV_HEADS + h) * WIDTH + d, mask=takes, other=0.0)
        new_v = tl.load(new_value + (b * KV_HEADS + h) * WIDTH + d, mask=takes, other=0.0)
        tl.store(key + b * key_b + h * key_h + newest * key_l + d, new_k, mask=takes)
        tl.store(value + b * value_b + h * value_h + newest * value_l + d, new_v, mask=takes)
        own = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * SCALE
        highest = tl.where(split == 0, own, -1e30)
        total = tl.where(split == 0, tl.full([ROWS], 1.0, tl.float32), 0.0)
        result = tl.zeros([ROWS, PADDED], tl.float32) + new_v.to(tl.float32)[None, :]
        for start in range(first, end, BLOCK):
            n = start + tl.arange(0, BLOCK)
            live = (n < end)[:, None] & (d < WIDTH)[None, :]
            k = tl.load(
                key + b * key_b + h * key_h + n[:, None] * key_l + d[None, :], mask=live, other=0.0
            )
            v = tl.load(
                value + b * value_b + h * value_h + n[:, None] * value_l + d[None, :],
                mask=live,
                other=0.0,
            )
            if ROWS == 1:
                s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
            else:
                s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where((n < end)[None, :], s * SCALE, -1e30)
            higher = tl.maximum(highest, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            keep = tl.exp2(highest - higher)
            total = total * keep + tl.sum(p, 1)
            if ROWS == 1:
                new = tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
            else:
                new = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            result = result * keep[:, None] + new
            highest = higher
        if SPLITS == 1:
            result = result / total[:, None]
            tl.store(
                out + heads[:, None] * WIDTH + d[None, :],
                result.to(out.dtype.element_ty),
                mask=there,
            )
        else:
            part = heads * SPLITS + split
            tl.store(parts + part[:, None] * WIDTH + d[None, :], result, mask=there)
            tl.store(sums + 2 * part, highest, mask=is_row)
            tl.store(sums + 2 * part + 1, total, mask=is_row)

    @triton.jit
    def _join(parts, sums, out, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, PADDED)
        highest = -1e30
        total = 0.0
        result = tl.zeros([PADDED], tl.float32)
        for split in range(SPLITS):
            m = tl.load(sums + 2 * (row * SPLITS + split))
            t = tl.load(sums + 2 * (row * SPLITS + split) + 1)
            part = tl.load(parts + (row * SPLITS + split) * WIDTH + d, mask=d < WIDTH, other=0.0)
            higher = tl.maximum(highest, m)
            keep, scale = tl.exp2(highest - higher), tl.exp2(m - higher)
            total = total * keep + t * scale
            result = result * keep + part * scale
            highest = higher
        tl.store(out + row * WIDTH + d, (result / total).to(out.dtype.element_ty), mask=d < WIDTH)
