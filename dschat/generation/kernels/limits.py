"""Block sizes with which Triton kernels fit into a GPU's shared memory.

A program has 227 KiB of it on an H100 and 99 KiB on an RTX 4090 or L4. A kernel that asks for more
does not start. The amounts were read from Triton 3.6's compilations for compute capabilities 8.0 to
12.0; they do not depend on the capability.
"""

import torch

# Shared memory of one program: an H100's until ``detect_shared_memory`` is called. It is a number
# in the module because torch.compile traces the kernels' callers and must not trace the query.
shared_bytes = 227 * 1024


def detect_shared_memory() -> None:
    """Set `shared_bytes` to the shared memory of the current GPU, if there is one."""
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
    """Return the number of stages of a product's pipeline, at most `most`.

    The pipeline holds blocks [rows, block_k] and [block_n, block_k] for all stages but one.
    """
    return max(1, min(most, 1 + shared // ((rows + block_n) * block_k * itemsize)))


def attention_block(*, rows: int, width: int, itemsize: int, shared: int) -> tuple[int, int]:
    """Return the cache positions that a program reads at a time, and the stages of its pipeline.

    Args:
        rows: queries of a program.
        width: padded width of a head.
        itemsize: bytes of an element.
        shared: bytes of shared memory that a program may use.
    """
    options = [(64, 3), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2)]
    if rows == 1:
        return options[0]  # no tensor cores, and nothing shared but sums
    for block, stages in options:
        pipeline = (stages - 1) * 2 * block * width * itemsize
        if pipeline + rows * (width + block) * itemsize + rows * 4 <= shared:
            return block, stages
    return 16, 1
