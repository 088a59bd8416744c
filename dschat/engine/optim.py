"""AdamW in parameter groups, and gradients that are not finite."""

import math
from collections.abc import Callable, Container
from typing import Any

import torch

from dschat.engine.compiled_ops import load_op
from dschat.runtime import dist

BETAS = (0.9, 0.95)


def adamw(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    lora_names: Container[str],
    lora_learning_rate: float,
    cpu_offload: bool,
) -> torch.optim.Optimizer:
    """Build AdamW over the trainable parameters.

    Matrices decay, vectors (biases, norms) do not. LoRA has a separate learning rate.

    Args:
        model: only its parameters that require gradients are stepped.
        learning_rate: of the parameters that are not LoRA's.
        weight_decay: of matrices.
        lora_names: names of LoRA parameters.
        lora_learning_rate: of those.
        cpu_offload: step on the host with DeepSpeedCPUAdam, which has to be compiled; otherwise
            with torch's fused AdamW.

    Raises:
        ValueError: nothing is trainable.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 every parameter is flat here; ds_shape is its real shape.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        rate = lora_learning_rate if name in lora_names else learning_rate
        groups.setdefault((rate, weight_decay if is_matrix else 0.0), []).append(parameter)
    if not groups:
        raise ValueError(
            "No parameter is trainable: lower --freeze_layers (in step 3 --actor_freeze_layers or "
            "--critic_freeze_layers), or leave --only_optimize_lora out."
        )
    param_groups: list[dict[str, Any]] = [
        {"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()
    ]
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_op("CPUAdamBuilder")  # on every rank of the host in turn
        return DeepSpeedCPUAdam(param_groups, betas=BETAS)
    # One kernel over all parameters: on two CPU cores 12 times faster than torch's default loop.
    fused = all(p.device.type in ("cpu", "cuda") for group in param_groups for p in group["params"])
    return torch.optim.AdamW(param_groups, betas=BETAS, fused=fused)


def torch_optimizer(engine) -> torch.optim.Optimizer:
    """Return torch's optimizer inside an engine, below that of ZeRO."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


class GradientCheck:
    """A check of all gradients of an update, before any engine steps.

    Every rank must make it, at a gradient-accumulation boundary. It computes the gradient norm of
    each engine in one pass, sums the squares over the ranks together with what the caller measured,
    and reads all of it in one transfer. DeepSpeed then steps with this norm. It would otherwise
    compute the norm again, and look for overflows in passes over every single gradient.

    Args:
        engines: the engines that step.
        measured: [K] float64 sums of this rank, to be read with the norms.

    Attributes:
        finite: whether all gradients of all engines on all ranks are finite.
        measured: the K sums over all ranks.
    """

    def __init__(self, *engines, measured: torch.Tensor | None = None):
        self.engines = engines
        squares = torch.stack([_square_norm(engine) for engine in engines])
        if measured is not None:
            squares = torch.cat([squares, measured.to(squares)])
        found = dist.all_reduce(squares).tolist()
        self._norms = []
        for square in found[: len(engines)]:
            self._norms.append(square if math.isnan(square) else math.sqrt(max(square, 0.0)))
        self.finite = all(math.isfinite(norm) for norm in self._norms)
        self.measured = found[len(engines) :]

    def step(self) -> None:
        """Step all engines, or none if any gradient of any of them on any rank is not finite.

        Each of DeepSpeed's optimizers skips its step on overflow, but knows nothing of the other
        engine's. A skipped step of fp16 lowers the loss scale.
        """
        for engine, norm in zip(self.engines, self._norms, strict=True):
            if _has_no_overflow_check(engine):
                engine._global_grad_norm = norm  # DeepSpeed (0.19.8) computes none here
                if not self.finite:
                    _count_skipped_step(engine)
                    continue
            if _takes_norm(engine):
                _step_with_norm(engine, norm if self.finite else math.inf)
                continue
            if not self.finite:
                _spoil_gradients(engine)
            engine.step()
            if not self.finite and engine.zero_optimization_stage() == 3:
                # A rank that owns no part of the first parameter would keep the planted infinity.
                engine.optimizer.grad_partitions_flat_buffer.zero_()


def step_together(*engines) -> bool:
    """Step all engines, or none of them; see `GradientCheck`.

    Call it after every backward, as engine.step; only at a gradient-accumulation boundary is there
    anything to check.

    Returns:
        True if the weights moved, or the window is not complete.
    """
    if not engines[0].is_gradient_accumulation_boundary():
        for engine in engines:
            engine.step()
        return True
    check = GradientCheck(*engines)
    check.step()
    return check.finite


def gradient_norm(engine) -> float:
    """Return the gradient norm of the last update, before clipping; NaN before the first one."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def _square_norm(engine) -> torch.Tensor:
    """Return this rank's part of the squared gradient norm, a float64 scalar.

    The parts of all ranks add up to it. It is infinite or NaN if a gradient is.
    """
    optimizer = engine.optimizer
    gradients = list(_local_gradients(engine))
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    if getattr(optimizer, "cpu_offload", False) and bool(optimizer.local_overflow):
        total += math.inf
    if gradients:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        total += torch.stack([norm.to(engine.device) for norm in norms]).double().square().sum()
    if engine.zero_optimization_stage() == 0:
        total /= dist.world_size()  # every rank holds all gradients
    return total


def _takes_norm(engine) -> bool:
    """Return whether DeepSpeed's optimizer can be given the norm: ZeRO without offload."""
    return engine.zero_optimization_stage() > 0 and not _is_offloaded(engine.optimizer)


def _is_offloaded(optimizer) -> bool:
    """Return whether ZeRO keeps the optimizer's states in host memory."""
    if getattr(optimizer, "cpu_offload", False):  # an attribute of stages 1 and 2
        return True
    return bool(getattr(optimizer, "offload_optimizer", False))  # of stage 3


def _step_with_norm(engine, norm: float) -> None:
    """Step an engine whose gradient norm is known; inf: skip the step.

    DeepSpeed (0.19.8) looks for overflows and takes the norm one gradient at a time, with several
    kernels each: on one H100 that is four fifths of the step of a 1.3B model.
    """
    optimizer = engine.optimizer
    value = torch.tensor(norm, dtype=torch.float32)
    replaced: dict[str, Callable] = {
        "has_overflow": lambda *_, **__: not math.isfinite(norm),
        "scaled_global_norm": lambda *_, **__: value,  # ZeRO 1 and 2
        "_get_norm_groups": lambda: [value],  # ZeRO 3
    }
    for name, function in replaced.items():
        setattr(optimizer, name, function)
    try:
        engine.step()
    finally:
        for name in replaced:
            delattr(optimizer, name)


def _has_no_overflow_check(engine) -> bool:
    """Return whether the engine steps plain torch AdamW: fp32 without ZeRO."""
    return engine.zero_optimization_stage() == 0 and not (
        engine.fp16_enabled() or engine.bfloat16_enabled()
    )


def _count_skipped_step(engine) -> None:
    """Drop the gradients, and count as engine.step does at an overflow.

    Calling engine.step instead would fail, since its clipping needs gradients.
    """
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()


def _spoil_gradients(engine) -> None:
    """Plant an infinity in the gradients, so that DeepSpeed skips the step as an overflow."""
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False):
        optimizer.local_overflow = True
    if _is_offloaded(optimizer):
        # Offloaded gradients are already on the host. DeepSpeed reads only their norms then.
        for key, norm in list(optimizer.norm_for_param_grads.items())[:1]:
            optimizer.norm_for_param_grads[key] = torch.full_like(norm, float("inf"))
    for gradient in _local_gradients(engine):
        gradient.view(-1)[:1].fill_(float("inf"))
        break


def _local_gradients(engine):
    """Yield the gradients that this rank's optimizer will read, for any ZeRO stage."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        found = [p.grad for p in engine.module.parameters()]
    elif stage == 3:
        found = [optimizer.grad_partitions_flat_buffer]
    elif optimizer.cpu_offload:
        found = []  # checked as they are copied to the host: local_overflow
    else:
        found = [g for gradients in optimizer.averaged_gradients.values() for g in gradients or ()]
    yield from (gradient for gradient in found if gradient is not None and gradient.numel())
