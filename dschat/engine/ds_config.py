"""Turn options into DeepSpeed's configuration, without DeepSpeed, a process group or a device."""

from dataclasses import replace

from dschat.config.options import SystemOptions

# ZeRO-3. A layer of a 7B model has 202M elements, and one layer is fetched ahead. DeepSpeed-Chat's
# 3e7 for both is less than one MLP matrix of it, so that nothing is ever fetched ahead.
ZERO3_MAX_LIVE = int(1e9)
ZERO3_PREFETCH = int(2e8)
# Norms, biases and adapters stay whole on every rank: gathering each alone costs more than memory.
ZERO3_PERSISTENT = int(3e5)
# Updates without overflow after which a dynamic fp16 loss scale doubles.
FP16_LOSS_SCALE_WINDOW = 100


def training_config(
    system: SystemOptions,
    *,
    dtype: str,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    on_cpu: bool,
    tensorboard_path: str | None = None,
    tensorboard_name: str = "",
    gradient_clipping: float = 1.0,
    ranks_per_node: int | None = None,
) -> dict:
    """Return the configuration of an engine that trains.

    Stage 0 with half precision or offload becomes stage 1.

    Args:
        dtype: "fp16", "bf16" or "fp32".
        micro_batch_size: rows per rank and backward.
        on_cpu: whether the run has no accelerator. Offload then uses torch's AdamW:
            DeepSpeedCPUAdam has to be compiled, and would gain nothing.
        tensorboard_path: if given, the engine's monitor writes below
            ``{path}/ds_tensorboard_logs/``.
        gradient_clipping: largest gradient norm; 0: no clipping.
        ranks_per_node: with MixZ++ under ZeRO-3 on several nodes, each node keeps a second set of
            partitions of the whole model, so that backward gathers within the node (Wang et al.
            2023, ZeRO++, hpZ). None: one node.
    """
    if system.zero_stage == 0 and (dtype != "fp32" or system.offload):
        # Without ZeRO nothing is offloaded. DeepSpeed's half-precision optimizer (0.19.8) begins
        # with a step on zero gradients, which spoils Adam's bias correction. In fp16 it also
        # divides the gradients by a loss scale by which the loss was never multiplied. Stage 1
        # takes the steps that stage 0 should.
        system = replace(system, zero_stage=1)
    config = _common(system, dtype=dtype, offload_optimizer=system.offload)
    config.update(
        train_micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        train_batch_size=micro_batch_size * gradient_accumulation_steps * world_size,
        gradient_clipping=gradient_clipping,
    )
    several_nodes = ranks_per_node is not None and ranks_per_node < world_size
    if system.frozen_format != "none" and system.zero_stage == 3 and several_nodes:
        config["zero_optimization"]["zero_hpz_partition_size"] = ranks_per_node
    if on_cpu:
        config["zero_force_ds_cpu_optimizer"] = False
    if tensorboard_path:
        config["tensorboard"] = {
            "enabled": True,
            "output_path": f"{tensorboard_path}/ds_tensorboard_logs/",
            "job_name": f"{tensorboard_name}_tensorboard",
        }
    return config


def inference_config(
    system: SystemOptions, *, dtype: str, micro_batch_size: int, world_size: int
) -> dict:
    """Return the configuration of an engine that only evaluates.

    Its weights are partitioned under ZeRO-3, and whole otherwise. Offloaded weights need ZeRO-3,
    whatever stage was asked for: it brings them to the device a layer at a time.
    """
    stage = 3 if system.zero_stage == 3 or system.offload else 0
    weights = SystemOptions(zero_stage=stage, offload=system.offload, pin_memory=system.pin_memory)
    config = _common(weights, dtype=dtype, offload_optimizer=False)
    config.update(
        train_micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=1,
        train_batch_size=micro_batch_size * world_size,
    )
    return config


def _common(system: SystemOptions, *, dtype: str, offload_optimizer: bool) -> dict:
    config: dict = {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # It would wait for the GPU at the start of every forward and at the end of every step.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(system),
    }
    if offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = _host(system)
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale_window": FP16_LOSS_SCALE_WINDOW}
    return config


def _zero(system: SystemOptions) -> dict:
    zero: dict = {"stage": system.zero_stage}
    if system.zero_stage in (1, 2):
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = int(1e8)
    if system.zero_stage == 3:
        zero.update(
            stage3_param_persistence_threshold=ZERO3_PERSISTENT,
            stage3_max_live_parameters=ZERO3_MAX_LIVE,
            stage3_prefetch_bucket_size=ZERO3_PREFETCH,
            memory_efficient_linear=False,
        )
        if system.offload:
            zero["offload_param"] = _host(system)
    return zero


def _host(system: SystemOptions) -> dict:
    return {"device": "cpu", "pin_memory": system.pin_memory}
