"""The accelerator that DeepSpeed runs on, and the precision that it supports."""

import torch
from deepspeed.accelerator import get_accelerator

from dschat.models.inference_device import TORCH_DTYPES
from dschat.runtime import dist
from dschat.runtime.hardware import bf16_unit
from dschat.runtime.log import logger

__all__ = ["TORCH_DTYPES", "on_cpu", "resolve_dtype"]


def on_cpu() -> bool:
    """Return whether DeepSpeed runs without an accelerator."""
    return get_accelerator().device_name() == "cpu"


def resolve_dtype(dtype: str, *, saved: str | None = None) -> str:
    """Resolve "auto" to the fastest precision of this device, and log why. Others stay.

    On an accelerator this is bf16, else fp16. On a CPU it is bf16 if it has instructions for bf16
    products, else fp32. A resumed run keeps its precision.

    Args:
        dtype: the value of --dtype.
        saved: the precision of the run that is resumed; None: none is resumed, or its checkpoint
            does not say.

    Raises:
        ValueError: the device cannot do it; names --dtype.
    """
    accelerator = get_accelerator()
    if dtype == "auto":
        chosen, reason = _fastest_dtype()
        if saved is not None:
            chosen, reason = saved, "that of the run that is resumed"
        logger.info(f"--dtype auto is {chosen} here: {reason}")
        dtype = chosen
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if dtype in supported and not supported[dtype]():
        others = [name for name, is_supported in supported.items() if is_supported()] + ["fp32"]
        raise ValueError(
            f"--dtype {dtype}: this {accelerator.device_name()} has none. Give "
            f"{' or '.join(others)}."
        )
    return dtype


def _fastest_dtype() -> tuple[str, str]:
    """Return the fastest precision of this device, and the reason."""
    accelerator = get_accelerator()
    if not on_cpu():
        name = accelerator.device_name()
        if accelerator.is_bf16_supported():
            return "bf16", f"this {name} supports it"
        return "fp16", f"this {name} does not support bf16"
    unit = bf16_unit()
    # All ranks need one precision, and their machines may differ.
    if dist.all_reduce(torch.tensor(int(bool(unit))), "min"):
        return "bf16", f"this CPU has instructions for it ({unit})"
    where = "the CPU of another rank" if unit else "this CPU"
    return "fp32", f"{where} has no instructions for bf16 (AMX, AVX-512-BF16 or Arm's)"
