"""AdamW in parameter groups, and gradients that are not finite."""

from collections.abc import Container
from typing import Any

import torch

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
    """AdamW over the trainable parameters; matrices decay, vectors (biases, norms) do not, LoRA has its own rate.

    torch's own fused AdamW needs no compiler; with `cpu_offload` DeepSpeedCPUAdam steps on the host.

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

        return DeepSpeedCPUAdam(param_groups, betas=BETAS)
    # One kernel over all parameters: on two CPU cores 12 times faster than torch's default loop.
    fused = all(p.device.type in ("cpu", "cuda") for group in param_groups for p in group["params"])
    return torch.optim.AdamW(param_groups, betas=BETAS, fused=fused)


def step_together(*engines) -> bool:
    """Step all engines, or none where any gradient of any of them on any rank is not finite.

    DeepSpeed's optimizers skip a step of their own on overflow; what they cannot know is the other engine's. So the
    gradients of the sound engines are spoiled too, and each skips as its precision does (fp16 lowers its loss scale).
    Call it after every backward, as engine.step; only at a gradient-accumulation boundary is there anything to check.

    Returns:
        True where the weights moved, or the window is not complete.
    """
    boundary = engines[0].is_gradient_accumulation_boundary()
    finite = True
    if boundary:
        flags = torch.stack([_is_finite(engine) for engine in engines]).min()
        finite = bool(dist.all_reduce(flags, "min"))
    for engine in engines:
        if not finite and _has_no_overflow_check(engine):
            _count_skipped_step(engine)
            continue
        if not finite:
            _spoil_gradients(engine)
        engine.step()
        if not finite and engine.zero_optimization_stage() == 3:
            # A rank that owns nothing of the first parameter would not overwrite what was planted there.
            engine.optimizer.grad_partitions_flat_buffer.zero_()
    return finite


def gradient_norm(engine) -> float:
    """The gradient norm of the last optimizer step; NaN where DeepSpeed does not tell it (fp32 without ZeRO)."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def _is_finite(engine) -> torch.Tensor:
    """Scalar int32 on the engine's device: 1 where all gradients that this rank holds are finite."""
    optimizer = engine.optimizer
    bad = torch.zeros((), dtype=torch.bool, device=engine.device)
    if getattr(optimizer, "cpu_offload", False):
        bad |= bool(optimizer.local_overflow)
    for gradient in _local_gradients(engine):
        # The extremes carry any inf or NaN, without a mask as large as the gradients.
        bad |= ~torch.isfinite(torch.stack(torch.aminmax(gradient))).all().to(bad.device)
    return (~bad).int()


def _has_no_overflow_check(engine) -> bool:
    """True for plain torch AdamW: fp32 without ZeRO."""
    return engine.zero_optimization_stage() == 0 and not (
        engine.fp16_enabled() or engine.bfloat16_enabled()
    )


def _count_skipped_step(engine) -> None:
    """Drop the gradients, and count as engine.step does at an overflow; its clipping fails without gradients."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()


def _spoil_gradients(engine) -> None:
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False):
        optimizer.local_overflow = True
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        # Offloaded gradients are on the host already; what DeepSpeed still reads of them before a step are norms.
        for key, norm in list(optimizer.norm_for_param_grads.items())[:1]:
            optimizer.norm_for_param_grads[key] = torch.full_like(norm, float("inf"))
    for gradient in _local_gradients(engine):
        gradient.view(-1)[:1].fill_(float("inf"))
        break


def _local_gradients(engine):
    """The gradients that this rank's optimizer will read, wherever this ZeRO stage keeps them."""
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
