"""The decode kernel beside poisoned memory.

Triton 3.6's interpreter runs it too: TRITON_INTERPRET=1 (with NumPy 2.1, later ones fail).
"""

import os

import pytest
import torch

from dschat.generation.kernels import attention

INTERPRETED = attention.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
    ),
]
POISON = 12345.0
BORDER = 64


def poisoned(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory filled with POISON, and a random tensor in its middle."""
    whole = torch.full((2 * BORDER + torch.Size(shape).numel(),), POISON, device=DEVICE)
    inside = whole[BORDER:-BORDER].view(shape)
    inside.normal_()
    return whole, inside


@pytest.mark.parametrize("width", [16, 24, 64])
def test_the_kernel_writes_inside_its_buffers(width):
    torch.manual_seed(0)
    memory_k, key = poisoned(2, 2, 70, width)
    memory_v, value = poisoned(2, 2, 70, width)
    query, new_key, new_value = (
        torch.randn(2, heads, 1, width, device=DEVICE) for heads in (4, 2, 2)
    )
    bounds = torch.tensor([[3, 70], [0, 1]], dtype=torch.int32, device=DEVICE).view(2, 1, 1, 2)
    attention.refuse_unfit(query, key, value, new_key, new_value, terms={})
    found = attention.decode_attention(query, key, value, new_key, new_value, bounds, 0.2)
    for memory in (memory_k, memory_v):
        assert (memory[:BORDER] == POISON).all() and (memory[-BORDER:] == POISON).all()
    for row, (first, end) in enumerate(bounds.view(2, 2).tolist()):
        k, v = (t[row, :, first:end].repeat_interleave(2, 0) for t in (key, value))
        expected = (0.2 * query[row] @ k.transpose(-1, -2)).softmax(-1) @ v
        assert torch.allclose(found[row], expected, atol=1e-4)


@pytest.mark.parametrize("heads", [2, 8], ids=["no groups", "groups"])
@pytest.mark.parametrize("rows, pages", [(3, 5), (3, 40)], ids=["short", "split"])
def test_pages_give_what_one_buffer_gives(heads, rows, pages):
    """Pages are in any order, two rows share their first ones, and rows begin anywhere."""
    torch.manual_seed(0)
    page, width = attention.PAGE, 24
    numbers = 1 + torch.randperm(rows * pages).view(rows, pages)
    numbers[1, :2] = numbers[0, :2]
    memory_k, key = poisoned(rows * pages + 1, 2, page, width)
    memory_v, value = poisoned(rows * pages + 1, 2, page, width)
    query = torch.randn(rows, heads, 1, width, device=DEVICE)
    new_key, new_value = (torch.randn(rows, 2, 1, width, device=DEVICE) for _ in range(2))
    edges = torch.tensor([[0, 2 * page + 1], [page + 7, 3 * page], [page - 1, pages * page]])
    bounds = torch.cat([edges, numbers], 1).to(DEVICE, torch.int32)[:, None, None]
    found = attention.decode_attention(query, key, value, new_key, new_value, bounds, 0.2)
    for memory in (memory_k, memory_v):
        assert (memory[:BORDER] == POISON).all() and (memory[-BORDER:] == POISON).all()
    for row, (first, end) in enumerate(edges.tolist()):
        k, v = (t[numbers[row]].transpose(0, 1).flatten(1, 2) for t in (key, value))
        assert torch.equal(k[:, end - 1], new_key[row, :, 0])
        assert torch.equal(v[:, end - 1], new_value[row, :, 0])
        k, v = (t[:, first:end].repeat_interleave(heads // 2, 0) for t in (k, v))
        expected = (0.2 * query[row] @ k.transpose(-1, -2)).softmax(-1) @ v
        assert torch.allclose(found[row], expected, atol=1e-4)
