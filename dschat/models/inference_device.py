"""Device and precision of a model for inference without an engine."""

import torch

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def inference_placement(dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device, a GPU if there is one, and the precision on it.

    Args:
        dtype: "fp16", "bf16" or "fp32", or "auto": bf16 (else fp16) on a GPU, and fp32 on a CPU,
            which is no faster in bf16 and slow in fp16.
    """
    on_gpu = torch.cuda.is_available()
    if dtype == "auto":
        if not on_gpu:
            dtype = "fp32"
        elif torch.cuda.is_bf16_supported():
            dtype = "bf16"
        else:
            dtype = "fp16"
    return torch.device("cuda" if on_gpu else "cpu"), TORCH_DTYPES[dtype]
