"""The accelerator that DeepSpeed runs on, and the precision that it supports."""

from deepspeed.accelerator import get_accelerator

from dschat.models.inference_device import TORCH_DTYPES

__all__ = ["TORCH_DTYPES", "on_cpu", "resolve_dtype"]


def on_cpu() -> bool:
    """Return whether DeepSpeed runs without an accelerator."""
    return get_accelerator().device_name() == "cpu"


def resolve_dtype(dtype: str) -> str:
    """Resolve "auto" to the best precision of this device: bf16, else fp16. Others stay.

    Raises:
        ValueError: the device cannot do it; names --dtype.
    """
    accelerator = get_accelerator()
    if dtype == "auto":
        return "bf16" if accelerator.is_bf16_supported() else "fp16"
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if dtype in supported and not supported[dtype]():
        others = [name for name, is_supported in supported.items() if is_supported()] + ["fp32"]
        raise ValueError(
            f"--dtype {dtype}: this {accelerator.device_name()} has none. Give {' or '.join(others)}."
        )
    return dtype
