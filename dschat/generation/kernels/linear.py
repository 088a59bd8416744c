"""Linear layers of a decode step: products of a few rows with large matrices.

Their speed is that of reading the matrices once. For up to 16 rows cuBLAS reads a matrix of 32 MiB
at 73% of a copy's bandwidth on an H100, and sums the parts of split products in separate kernels.
Here each program streams whole rows of a matrix through tensor cores. Layers that read the same
input (query, key and value; gate and up) share one launch, although their weights are separate
tensors: they are the training weights, which cannot be packed.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from dschat.generation.kernels import limits
from dschat.models.families import SHARED_INPUT_NAMES

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds do not include it
    triton = None

MAX_ROWS = 16  # the smallest number of rows that a tensor core's product has
# By the smallest number of outputs: rows and columns of the matrix that a program reads at a time,
# warps, pipeline stages, and whether the matrix is the left factor. Measured on an H100. Larger
# blocks for few outputs would leave some of its 132 multiprocessors without a program.
SETTINGS = {
    6144: dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=6, LEFT=True),
    4096: dict(BLOCK_N=32, BLOCK_K=256, num_warps=2, num_stages=6, LEFT=False),
    0: dict(BLOCK_N=16, BLOCK_K=512, num_warps=2, num_stages=5, LEFT=False),
}


class SharedLaunch:
    """Layers that read the same input, and the outputs that one launch computed for them.

    The first layer computes the outputs of all and returns its own. The other layers, which the
    model calls after it in order, take theirs from `outputs`.

    Attributes:
        layers: the layers, in the order in which the model calls them.
        outputs: what the layers after the first have not taken yet.
    """

    def __init__(self, layers: tuple["SkinnyLinear", ...]) -> None:
        self.layers = layers
        self.outputs: list[torch.Tensor] = []


class SkinnyLinear(nn.Linear):
    """An nn.Linear that uses the kernel for at most MAX_ROWS rows in half precision on a GPU.

    It is made from an nn.Linear by ``use_skinny_linears``, which sets `launch`.
    """

    launch: SharedLaunch
    active = True  # False inside ``plain_products``

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        rows = x.numel() // x.shape[-1]
        if rows > MAX_ROWS or not x.is_cuda or x.dtype == torch.float32 or not self.active:
            return F.linear(x, self.weight, self.bias)
        launch = self.launch
        is_first = launch.layers[0] is self
        if launch.outputs and not is_first:
            return launch.outputs.pop(0)
        # A layer that is called out of turn computes its own output alone.
        layers = launch.layers if is_first else (self,)
        flat = x.reshape(rows, x.shape[-1]).contiguous()
        found = skinny_linear(
            flat, [layer.weight for layer in layers], [layer.bias for layer in layers]
        )
        found = [out.view(*x.shape[:-1], out.shape[-1]) for out in found]
        launch.outputs[:] = found[1:]
        return found[0]


@contextlib.contextmanager
def plain_products():
    """Make every SkinnyLinear compute as nn.Linear does, inside this context."""
    SkinnyLinear.active = False
    try:
        yield
    finally:
        SkinnyLinear.active = True


def use_skinny_linears(layers: nn.ModuleList) -> None:
    """Turn every nn.Linear inside the decoder layers into a SkinnyLinear.

    The class of the objects changes and the objects stay: weights keep their addresses, and others
    that hold a layer (the replica's parts, LoRA) keep seeing it.
    """
    limits.detect_shared_memory()
    for parent in layers.modules():
        members = {name: m for name, m in parent.named_children() if type(m) is nn.Linear}
        names: dict[str, tuple[str, ...]] = {name: (name,) for name in members}
        for group in SHARED_INPUT_NAMES:
            alike = {members[name].in_features for name in group if name in members}
            if set(group) <= set(members) and len(alike) == 1:
                names.update(dict.fromkeys(group, group))
        launches = {
            group: SharedLaunch(tuple(members[name] for name in group)) for group in names.values()
        }
        for name, linear in members.items():
            linear.__class__ = SkinnyLinear
            linear.launch = launches[names[name]]


def use_plain_linears(layers: nn.ModuleList) -> None:
    """Turn every SkinnyLinear inside the decoder layers back into an nn.Linear."""
    for linear in layers.modules():
        if type(linear) is SkinnyLinear:
            linear.__class__ = nn.Linear
            del linear.launch


def skinny_linear(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Compute x W' + b for one to three W, summed in fp32 and rounded once.

    Args:
        x: [M, K], contiguous; M is at most MAX_ROWS.
        weights: [N, K] each, contiguous; N may differ.
        biases: [N] each, or None for all.

    Returns:
        [M, N] for each weight.
    """
    m, k = x.shape
    widths = [weight.shape[0] for weight in weights]
    outs = [torch.empty(m, n, dtype=x.dtype, device=x.device) for n in widths]
    outputs = sum(widths)
    if outputs >= 6144:
        settings = dict(SETTINGS[6144])
    elif outputs >= 4096:
        settings = dict(SETTINGS[4096])
    else:
        settings = dict(SETTINGS[0])
    settings["num_stages"] = limits.product_stages(
        settings["num_stages"],
        rows=MAX_ROWS,
        block_n=settings["BLOCK_N"],
        block_k=settings["BLOCK_K"],
        itemsize=x.element_size(),
        shared=limits.shared_bytes,
    )
    programs = sum((n + settings["BLOCK_N"] - 1) // settings["BLOCK_N"] for n in widths)
    pick = [min(i, len(weights) - 1) for i in range(3)]
    biased = biases[0] is not None
    _skinny[(programs,)](
        x,
        *(weights[i] for i in pick),
        *((biases if biased else weights)[i] for i in pick),
        *(outs[i] for i in pick),
        m,
        *(widths[i] for i in pick),
        K=k,
        NUM=len(weights),
        BIASED=biased,
        EVEN=k % settings["BLOCK_K"] == 0,
        **settings,
    )
    return outs


if triton is not None:

    @triton.jit
    def _skinny(
        x,
        weight_0,
        weight_1,
        weight_2,
        bias_0,
        bias_1,
        bias_2,
        out_0,
        out_1,
        out_2,
        m,
        n_0,
        n_1,
        n_2,
        K: tl.constexpr,
        NUM: tl.constexpr,
        BIASED: tl.constexpr,
        EVEN: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        LEFT: tl.constexpr,
    ):
        program = tl.program_id(0)
        weight, bias, out, n = weight_0, bias_0, out_0, n_0
        if NUM > 1:
            if program >= tl.cdiv(n_0, BLOCK_N):
                program -= tl.cdiv(n_0, BLOCK_N)
                weight, bias, out, n = weight_1, bias_1, out_1, n_1
                if NUM > 2:
                    if program >= tl.cdiv(n_1, BLOCK_N):
                        program -= tl.cdiv(n_1, BLOCK_N)
                        weight, bias, out, n = weight_2, bias_2, out_2, n_2
        rows = tl.arange(0, 16)
        columns = program * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        is_row, is_column = rows < m, columns < n
        x_at = x + rows[:, None] * K + inner[None, :]
        weight_at = weight + columns[:, None].to(tl.int64) * K + inner[None, :]
        if LEFT:
            total = tl.zeros([BLOCK_N, 16], tl.float32)
        else:
            total = tl.zeros([16, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            if EVEN:
                w = tl.load(weight_at + start, mask=is_column[:, None], other=0.0)
                a = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
            else:
                live = (inner < K - start)[None, :]
                w = tl.load(weight_at + start, mask=is_column[:, None] & live, other=0.0)
                a = tl.load(x_at + start, mask=is_row[:, None] & live, other=0.0)
            if LEFT:
                total = tl.dot(w, tl.trans(a), total)
            else:
                total = tl.dot(a, tl.trans(w), total)
        if LEFT:
            total = tl.trans(total)
        if BIASED:
            total += tl.load(bias + columns, mask=is_column, other=0.0)[None, :].to(tl.float32)
        at = out + rows[:, None] * n + columns[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
