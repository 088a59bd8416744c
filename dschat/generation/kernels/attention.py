"""Attention of one new token over a static key-value cache, as a Triton kernel.

A kernel that takes a mask reads the whole cache, however little of it is filled. This one receives
bounds [first, end) for each row in device memory. It reads neither left padding nor the unfilled
end, and one captured CUDA graph serves every length. Long rows are split over several programs
(Flash-Decoding, Dao et al. 2023); a second kernel joins their parts. The kernel also writes the
token's key and value to the cache, which would otherwise be two launches per layer.

A cache is one buffer for each row, or pages of PAGE positions that any row may use
(PagedAttention, Kwon et al. 2023). The numbers of a row's pages then come after its bounds.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dschat.generation.kernels import limits

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds do not include it
    triton = None

NAME = "dschat_decode"
PROGRAMS = 512  # programs to aim for: four on each multiprocessor of an H100
MAX_SPLITS = 16
PAGE = 64  # positions of a page; a multiple of what a program reads at a time
# Arguments of transformers' attention that change the scores: caps, sinks, biases by position.
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias", "head_mask")


class UnfitAttention(ValueError):
    """An error: a model's attention has other shapes or terms than the kernel computes."""


class NewestToken:
    """Key and value of a decode step's newest token, from the cache's update to the attention.

    The update receives them but calls no attention; the attention of the same layer runs right
    after it and receives only what the update returns, which is the whole cache. transformers has
    no argument between the two, so the update puts the tensors here and the attention takes them.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def put(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Leave the newest token's key and value [B, K, 1, D] to the attention that comes next."""
        self._pairs.append((key, value))

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove and return the key and value that were put last."""
        return self._pairs.pop()

    def clear(self) -> None:
        """Drop what no attention took, which happens if the model has another attention."""
        self._pairs.clear()


newest_token = NewestToken()  # one for all: steps run one after the other


def register() -> None:
    """Register the attention with transformers under NAME.

    A call with anything but bounds runs transformers' sdpa.
    """
    limits.detect_shared_memory()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """Attend with the signature of transformers' attention functions.

    Args:
        module: the model's attention module.
        query: [B, H, T, D].
        key, value: [B, K, L, D].
        attention_mask: bounds [B, 1, 1, 2 + P] int32 for a decode step (T = 1), else a mask as
            sdpa takes it. A decode step writes the key and value in `newest_token` to `key` and
            `value`, which are the cache as ``decode_attention`` takes it.
        dropout, scaling: as sdpa takes them.
        kwargs: sliding_window, positions that the newest token attends to, itself included; None
            or absent: all.

    Returns:
        The output [B, T, H, D], and None for the attention weights.

    Raises:
        UnfitAttention: a decode step that the kernel would compute wrongly, or that would let it
            write outside of the cache.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    if window is not None:
        first, end = attention_mask[..., :1], attention_mask[..., 1:2]
        first = torch.maximum(first, end - window)
        attention_mask = torch.cat([first, attention_mask[..., 1:]], dim=-1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new_key, new_value = newest_token.take()
    paged = attention_mask.shape[-1] > 2
    refuse_unfit(query, key, value, new_key, new_value, paged=paged, terms=kwargs)
    output = decode_attention(query, key, value, new_key, new_value, attention_mask, scale)
    return output.transpose(1, 2), None


def refuse_unfit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    *,
    paged: bool = False,
    terms: Mapping[str, Any],
) -> None:
    """Check that ``decode_attention`` computes this attention, and stays inside the cache.

    The kernel reads and writes rows of one width: that of the query. A model that caches something
    else than it attends to (latent attention), or whose values are narrower than its keys, would
    let it write past their ends.

    Args:
        query, key, value, new_key, new_value: as ``decode_attention`` takes them.
        paged: whether the cache has pages.
        terms: further arguments of the model's attention, by name.

    Raises:
        UnfitAttention: widths or heads differ, or a term of the scores is not computed.
    """
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    cached = (kv_heads, key.shape[2], width)
    newest = (batch, kv_heads, 1, width)
    fits = (
        tokens == 1
        and kv_heads > 0
        and heads % kv_heads == 0
        and (key.shape[2] == PAGE if paged else key.shape[0] >= batch)
        and key.shape[1:] == value.shape[1:] == cached
        and new_key.shape == new_value.shape == newest
        and key.stride(-1) == value.stride(-1) == 1
    )
    if not fits:
        shapes = dict(query=query, key=key, value=value, new_key=new_key, new_value=new_value)
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items())
        raise UnfitAttention(
            f"its attention has other shapes than the decode kernel reads: {found}"
        )
    used = [name for name in UNKNOWN_TERMS if terms.get(name) is not None]
    if used:
        raise UnfitAttention(f"the decode kernel does not compute {', '.join(used)}")


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute softmax(scale q k') v over the cache positions first <= i < end of each row.

    Position end - 1 of each row is overwritten first, with the new key and value.

    Args:
        query: [B, H, 1, D].
        key, value: the cache, [N, K, L, D] with N >= B and H a multiple of K; with pages, [number
            of pages, K, PAGE, D]. The last dimension is contiguous.
        new_key, new_value: [B, K, 1, D].
        bounds: [B, 1, 1, 2 + P] int32, first and end of each row; end > first. With pages, the
            number of the page that holds positions [PAGE i, PAGE (i + 1)) is element 2 + i.
        scale: factor of the scores.

    Returns:
        [B, H, 1, D].
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
    pages = bounds.shape[-1] - 2
    longest = pages * PAGE if pages else key.shape[2]
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (batch * kv_heads), longest // block))
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
        bounds.contiguous(),
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
        PAGES=pages,
        PAGE=PAGE,
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
    def _offset(bounds, position, page_stride, stride, PAGES: tl.constexpr, PAGE: tl.constexpr):
        """Return where a position of a row is in the cache, or in the row's own buffer."""
        offset = position * stride
        if PAGES > 0:
            page = tl.load(bounds + 2 + position // PAGE).to(tl.int64)
            offset = page * page_stride + position % PAGE * stride
        return offset

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
        PAGES: tl.constexpr,
        PAGE: tl.constexpr,
    ):
        b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
        h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
        split = tl.program_id(1)
        # The part of the cache that is read ends before the new token.
        bounds += (2 + PAGES) * b
        low, newest = tl.load(bounds), tl.load(bounds + 1) - 1
        if PAGES > 0:
            first = low // BLOCK * BLOCK  # no block reaches into a second page
        else:
            first = low
            # The row's own buffer.
            key += b * key_b
            value += b * value_b
        share = tl.cdiv(tl.cdiv(newest - first, SPLITS), BLOCK) * BLOCK
        first += split * share
        end = tl.minimum(newest, first + share)
        d = tl.arange(0, PADDED)
        rows = tl.arange(0, ROWS)
        heads = b * KV_HEADS * GROUP + h * GROUP + rows
        is_row = rows < GROUP
        there = is_row[:, None] & (d < WIDTH)[None, :]
        q = tl.load(query + heads[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        # The first program of a row begins with the new token and writes it. None reads its place.
        takes = (split == 0) & (d < WIDTH)
        new_k = tl.load(new_key + (b * KV_HEADS + h) * WIDTH + d, mask=takes, other=0.0)
        new_v = tl.load(new_value + (b * KV_HEADS + h) * WIDTH + d, mask=takes, other=0.0)
        new_key_at = key + h * key_h + _offset(bounds, newest, key_b, key_l, PAGES, PAGE)
        new_value_at = value + h * value_h + _offset(bounds, newest, value_b, value_l, PAGES, PAGE)
        tl.store(new_key_at + d, new_k, mask=takes)
        tl.store(new_value_at + d, new_v, mask=takes)
        own = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * SCALE
        highest = tl.where(split == 0, own, -1e30)
        total = tl.where(split == 0, tl.full([ROWS], 1.0, tl.float32), 0.0)
        result = tl.zeros([ROWS, PADDED], tl.float32) + new_v.to(tl.float32)[None, :]
        for start in range(first, end, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = (n >= low) & (n < end)
            live = inside[:, None] & (d < WIDTH)[None, :]
            key_at = key + h * key_h + _offset(bounds, start, key_b, key_l, PAGES, PAGE)
            value_at = value + h * value_h + _offset(bounds, start, value_b, value_l, PAGES, PAGE)
            m = tl.arange(0, BLOCK)[:, None]
            k = tl.load(key_at + m * key_l + d[None, :], mask=live, other=0.0)
            v = tl.load(value_at + m * value_l + d[None, :], mask=live, other=0.0)
            if ROWS == 1:
                s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
            else:
                s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where(inside[None, :], s * SCALE, -1e30)
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
