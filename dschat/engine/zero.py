"""Parameters that ZeRO-3 keeps in pieces: seen whole, one at a time."""

import contextlib

import deepspeed
import torch

from dschat.runtime import dist


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 holds only a piece of this parameter on each rank."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters, *, modify: bool = False):
    """Gather the parameters on every rank; with `modify`, all ranks keep rank 0's changes."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def full_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's state dict as whole CPU tensors on rank 0, and {} on the others.

    Parameters are gathered one at a time, so no rank holds a second whole model on its device.
    Tied parameters keep both names and one storage. All ranks must call it.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            with gathered([tensor]):
                # Only rank 0 keeps tensors; on a CPU a clone, since training changes the original.
                seen[id(tensor)] = (
                    tensor.detach().to("cpu", copy=True) if dist.is_main() else tensor
                )
        if dist.is_main():
            tensors[name] = seen[id(tensor)]
    return tensors


def scale_parameter(parameter: torch.Tensor, factor: float) -> None:
    """Multiply a parameter by `factor` in place, partitioned or whole. All ranks must call it."""
    with gathered([parameter], modify=True), torch.no_grad():
        if not is_partitioned(parameter) or dist.is_main():
            parameter.mul_(factor)
