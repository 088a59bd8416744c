"""Kernels' sizes against GPUs' shared memory, as read from Triton 3.6's compilations."""

import pytest

from dschat.generation.kernels import limits
from dschat.generation.kernels.limits import attention_block, product_stages
from dschat.generation.kernels.linear import MAX_ROWS, SETTINGS

H100, A100, L4 = 232448, 166912, 101376  # bytes that a program may take
# By outputs: bytes that the product compiled to on an A100 and an L4, with an L4's stages.
PRODUCTS = {6144: (102400, 81920), 4096: (122880, 98304), 0: (131072, 98304)}


def stages_of(outputs: int, shared: int) -> int:
    given = SETTINGS[outputs]
    sizes = dict(rows=MAX_ROWS, block_n=given["BLOCK_N"], block_k=given["BLOCK_K"], itemsize=2)
    return product_stages(given["num_stages"], shared=shared, **sizes)


@pytest.mark.parametrize("outputs", SETTINGS)
def test_products_keep_their_pipeline_on_large_gpus_and_fit_small_ones(outputs):
    given, (on_a100, on_l4) = SETTINGS[outputs], PRODUCTS[outputs]
    assert stages_of(outputs, H100) == stages_of(outputs, A100) == given["num_stages"]
    per_stage = (MAX_ROWS + given["BLOCK_N"]) * given["BLOCK_K"] * 2
    assert (given["num_stages"] - 1) * per_stage == on_a100 > L4
    assert (stages_of(outputs, L4) - 1) * per_stage == on_l4 <= L4 < on_l4 + per_stage


@pytest.mark.parametrize(
    "itemsize, width, shared, block, stages",
    [
        (2, 128, L4, 64, 3),  # compiled to 71680 bytes
        (2, 256, H100, 64, 3),  # 141312
        (2, 256, L4, 64, 2),  # 75776
        (4, 128, H100, 64, 3),  # 143424
        (4, 128, L4, 64, 2),  # 77888
        (4, 256, H100, 64, 2),  # 151616; with three stages 282688, which an H100 does not have
        (4, 256, L4, 32, 2),  # 84032
    ],
)
def test_grouped_attention_reads_the_largest_block_that_fits(
    itemsize, width, shared, block, stages
):
    assert attention_block(rows=16, width=width, itemsize=itemsize, shared=shared) == (
        block,
        stages,
    )


def test_attention_without_groups_needs_little_shared_memory():
    assert attention_block(rows=1, width=256, itemsize=4, shared=48 * 1024) == (64, 3)


def test_shared_memory_is_read_from_the_gpu(monkeypatch):
    class Properties:
        shared_memory_per_block_optin = L4

    monkeypatch.setattr(limits, "shared_bytes", H100)
    monkeypatch.setattr(limits.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(limits.torch.cuda, "get_device_properties", lambda: Properties)
    limits.detect_shared_memory()
    assert limits.shared_bytes == L4
