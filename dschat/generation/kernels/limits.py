"""Sizes of Triton kernels that fit into a GPU's shared memory: 227 KiB for a program of an H100, 99
of an RTX 4090 or L4.

A kernel that asks for more does not start. What one asks for was read from Triton 3.6's
compilations for compute
capabilities 8.0 to 12.0, of which it does not depend.
"""

import torch

shared_bytes = 227 * 1024  # of one program; an H100's, until ``detect_shared_memory`` has asked


def detect_shared_memory() -> None:
    """Read the shared memory of the current GPU, if there is one."""
    global shared_bytes
    if torch.cuda.is_available():
        shared_bytes = torch.cuda.get_device_properties().shared_memory_per_block_optin


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`, which is at least 1.

    torch.compile traces this function; it does not trace Triton's.
    """
    return 1 << (number - 1).bit_length()


def product_stages(
    most: int, *, rows: int, block_n: int, block_k: int, itemsize: int, shared: int
) -> int:
    """Stages, at most `most`, of a pipeline that holds blocks [rows, block_k] and [block_n,
    block_k] for all but one.
    """
    return max(1, min(most, 1 + shared // ((rows + block_n) * block_k * itemsize)))


def attention_block(*, rows: int, width: int, itemsize: int, shared: int) -> tuple[int, int]:
    """Cache positions that a program reads at a time, and stages of its pipeline, for `rows`
    queries of padded `width`.
    """
    options = [(64, 3), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2)]
    if rows == 1:
        return options[0]  # no tensor cores, and nothing shared but sums
    for block, stages in options:
        pipeline = (stages - 1) * 2 * block * width * itemsize
        if pipeline + rows * (width + block) * itemsize + rows * 4 <= shared:
            return block, stages
    return 16, 1
