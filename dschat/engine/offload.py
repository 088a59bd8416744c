"""Offload the states that only updates need to host memory while an engine generates or waits.

These are Adam's moments, fp32 master weights and gradient buffers. The weights in training
precision stay on the device, since generation reads them.
"""

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states

from dschat.engine.optim import torch_optimizer


def offload_idle_states(engine, *, pin_memory: bool = True) -> None:
    """Move the optimizer's states of `engine` to host memory, unless --offload keeps them there."""
    if engine.zero_use_cpu_optimizer():
        return
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.offload_states(include=[State.optim_states, State.hp_params], pin_memory=pin_memory)
        return
    if stage == 3:
        engine.offload_states(include=[State.contiguous_grad_buffer], pin_memory=pin_memory)
        # DeepSpeed (0.19.8) moves only FusedAdam's states by itself, and that has to be compiled.
        for master in engine.optimizer.fp32_partitioned_groups_flat:
            master.data = _copy(master.data, pin_memory)
    offload_optimizer_states(torch_optimizer(engine), "cpu", pin_memory=pin_memory)
    get_accelerator().empty_cache()


def reload_idle_states(engine) -> None:
    """Move the states back that ``offload_idle_states`` moved away."""
    if engine.zero_use_cpu_optimizer():
        return
    stage = engine.zero_optimization_stage()
    if stage != 0:
        engine.reload_states()
    if stage in (1, 2):
        return
    if stage == 3:
        for master in engine.optimizer.fp32_partitioned_groups_flat:
            master.data = master.data.to(engine.device)
    reload_optimizer_states(torch_optimizer(engine), engine.device)


def _copy(tensor, pin_memory: bool):
    """Return a copy of `tensor` in host memory."""
    host = tensor.new_empty(tensor.shape, device="cpu")
    if pin_memory:
        host = get_accelerator().pin_memory(host)
    return host.copy_(tensor)
