"""The device and precision of a model that only answers or scores, without an engine."""

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def inference_placement(dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device, a GPU where there is one, and the precision on it.

    Args:
        dtype: "fp16", "bf16" or "fp32", or "auto": bf16 (else fp16) on a GPU, and fp32 on a CPU, which gains nothing
            from less and has no fast fp16.
    """
    on_gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "fp32" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return torch.device("cuda" if on_gpu else "cpu"), DTYPES[dtype]
