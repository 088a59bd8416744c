"""The bytes that a model in its engine needs on each GPU and on each host, before it is loaded.

Between updates a model keeps weights, fp32 master weights, Adam's two moments, gradients and
buffers. In addition each phase needs memory for a time: building an engine, generation, scoring,
the backward passes, the optimizer steps, evaluation. The peak is the largest phase together with
what is kept. ZeRO (Rajbhandari et al. 2020, section 3) divides what is kept by the number of ranks.
The constants are those of DeepSpeed's optimizers and of engine/ds_config.py.
"""

import math
from dataclasses import dataclass
from typing import Any

from dschat.config.options import SystemOptions
from dschat.engine.ds_config import ZERO3_PREFETCH, training_config
from dschat.generation.kernels.limits import next_power_of_two
from dschat.memory.model_size import ModelSize

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's default reduce_bucket_size; engine/ds_config.py sets it for stages 1 and 2 only.
ZERO3_BUCKET = int(5e8)
ZERO3_SUB_GROUP = int(1e9)  # elements that DeepSpeed's ZeRO-3 optimizer steps at a time
ZERO3_LIVE = 2 * ZERO3_PREFETCH  # gathered elements: about a layer, and what is fetched ahead
ZERO12_BUCKET = int(1e8)


@dataclass(frozen=True)
class Footprint:
    """The bytes of one model inside its engine, on one rank.

    Attributes:
        weights: in training precision.
        master: fp32 master weights.
        adam: the two moments.
        average: the moving average of --enable_ema.
        buffers: communication buffers and gathered weights, always there or at any time.
        gradients: from the end of a backward to the optimizer step.
        waiting: gradients of earlier micro-batches and their bucket, during forward and backward.
        early: gradients of this micro-batch and their bucket, at the same time as the activations.
        reduce: in addition to the gradients at the end of a backward.
        step: in addition to the gradients in the optimizer step.
        freed: the part of the gradients that is freed by then; `step` is smaller by it.
        build: in addition to the weights while the engine is built.
        host: on the host.
        host_weights: the part of `host` that is weights.
        whole: all weights, as they are read into host memory.
        read_once: one rank reads the weights for all, instead of each rank.
        idle: the part of `resident` that --offload_idle_states moves to the host between updates.
        idle_host: the bytes that `idle` takes on the host.
    """

    weights: float
    master: float = 0.0
    adam: float = 0.0
    average: float = 0.0
    buffers: float = 0.0
    gradients: float = 0.0
    waiting: float = 0.0
    early: float = 0.0
    reduce: float = 0.0
    step: float = 0.0
    freed: float = 0.0
    build: float = 0.0
    host: float = 0.0
    host_weights: float = 0.0
    whole: float = 0.0
    read_once: bool = False
    idle: float = 0.0
    idle_host: float = 0.0

    @property
    def resident(self) -> float:
        """The bytes on the GPU between updates."""
        return self.weights + self.master + self.adam + self.average + self.buffers


def inference_footprint(
    size: ModelSize,
    *,
    stage: int,
    offload: bool,
    width: int,
    world_size: int,
    pin_memory: bool = True,
) -> Footprint:
    """Return the footprint of a model that only evaluates.

    It is partitioned under ZeRO-3 or if it is offloaded, else whole.
    """
    whole = width * size.parameters
    held = size.weight_bytes(width)
    if stage != 3 and not offload:
        return Footprint(weights=held, buffers=width * size.largest_quantized, whole=whole)
    part = held / world_size
    gathered = _gathered(size, width=width, world_size=world_size, offload=offload)
    host = part * (size.rounding if pin_memory else 1.0) if offload else 0.0
    return Footprint(
        weights=0.0 if offload else part,
        buffers=gathered + width * size.largest_quantized,
        build=0.0 if offload else (whole - held) / world_size,
        host=host,
        host_weights=host,
        whole=whole,
        read_once=True,
    )


def training_footprint(
    size: ModelSize,
    system: SystemOptions,
    *,
    dtype: str,
    world_size: int,
    accumulation: int = 1,
    average: bool = False,
) -> Footprint:
    """Return the footprint of a model that trains.

    Args:
        size: of the model.
        system: options of its training.
        dtype: "fp16", "bf16" or "fp32".
        world_size: ranks, one GPU each.
        accumulation: micro-batches per optimizer step.
        average: keep a moving average of the trained weights.
    """
    width = WIDTHS[dtype]
    stage = training_stage(system, dtype=dtype)
    if stage == 0:  # plain AdamW on fp32 weights
        trained = 4.0 * size.trained
        return Footprint(
            weights=size.weight_bytes(4),
            whole=4.0 * size.parameters,
            buffers=4.0 * size.largest_quantized,
            adam=2 * trained,
            idle=2 * trained,
            idle_host=2 * trained * (size.rounding if system.pin_memory else 1.0),
            average=trained * average,
            gradients=trained,
            waiting=trained if accumulation > 1 else 0.0,
        )
    make = _zero3 if stage == 3 else _zero12
    return make(
        size,
        system,
        stage=stage,
        width=width,
        world_size=world_size,
        accumulates=accumulation > 1,
        average=4.0 * size.trained / world_size if average else 0.0,
    )


def training_stage(system: SystemOptions, *, dtype: str) -> int:
    """Return the ZeRO stage that training runs at: 1 for stage 0 with half precision or offload."""
    config = training_config(
        system,
        dtype=dtype,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        on_cpu=False,
    )
    return config["zero_optimization"]["stage"]


def _zero12(
    size: ModelSize,
    system: SystemOptions,
    *,
    stage: int,
    width: int,
    world_size: int,
    accumulates: bool,
    average: float,
) -> Footprint:
    whole = width * size.trained
    part = width * size.trained / world_size
    group = max(size.groups) / world_size
    bucket = width * ZERO12_BUCKET
    # Stage 1 keeps whole gradients until the end of the last backward. Stage 2 moves them to this
    # rank's part, which exists from the first full bucket, or to the host if offloaded.
    held: float
    if stage == 1:
        held = whole
        waiting = held + bucket if accumulates else 0.0
        early = 0.0 if accumulates else bucket
    else:
        held = 0.0 if system.offload else part
        waiting = held if accumulates else 0.0
        early = bucket + held
    # The optimizer copies each group's weights into one flat tensor, one group after the other.
    build = width * max(size.groups)
    shared: dict[str, Any] = dict(
        weights=size.weight_bytes(width),
        whole=width * size.parameters,
        gradients=held,
        waiting=waiting,
        early=early,
        build=build,
    )
    dense = width * size.largest_quantized  # one quantized matrix, as it is multiplied
    shares = [group / world_size for group in size.groups]
    # fp32 weights, and gradients as large; each group's are one buffer.
    fp32 = sum(_on_host(4 * share, system.pin_memory) for share in shares)
    if system.offload:
        trained = size.trained / world_size
        in_width = sum(_on_host(width * share, system.pin_memory) for share in shares)
        # Gradients that accumulate, each in its own buffer.
        accumulated = 0.0
        if accumulates:
            accumulated = whole * (size.rounding if system.pin_memory else 1.0)
        return Footprint(
            **shared,
            buffers=width * size.largest_trained + dense,
            reduce=bucket,
            # Also two moments, and weights in `width`.
            host=2 * fp32 + 8 * trained + in_width + average + accumulated,
        )
    return Footprint(
        **shared,
        master=4.0 * size.trained / world_size,
        adam=8.0 * size.trained / world_size,
        idle=12.0 * size.trained / world_size,
        idle_host=3 * fp32,
        buffers=dense,
        average=average,
        reduce=bucket + (part if stage == 1 else 0.0),
        # A group's gradients, flat, and once more in fp32; other ranks' are freed by then.
        step=(width + 4 if width == 2 else 4) * group - (held - part),
        freed=held - part,
    )


def _zero3(
    size: ModelSize,
    system: SystemOptions,
    *,
    stage: int,
    width: int,
    world_size: int,
    accumulates: bool,
    average: float,
) -> Footprint:
    whole = width * size.parameters
    weights = size.weight_bytes(width) / world_size
    part = size.trained / world_size
    gathered = _gathered(size, width=width, world_size=world_size, offload=system.offload)
    gathered += width * size.largest_quantized
    bucket = width * ZERO3_BUCKET
    shares = [group / world_size for group in size.groups]
    fp32 = sum(
        _on_host(4 * chunk, system.pin_memory) for share in shares for chunk in _sub_groups(share)
    )
    if system.offload:
        # Frozen weights have a buffer each; trained ones are flat, and always page-locked.
        frozen = (weights - width * part) * (size.rounding if system.pin_memory else 1.0)
        held = frozen + sum(_on_host(width * share, True) for share in shares)
        # fp32 weights and two moments; all gradients in `width`, those of the sub-groups in fp32.
        host = held + 12 * part + _on_host(width * part, system.pin_memory) + fp32 + average
        buffers = bucket + gathered
        return Footprint(
            weights=0.0, buffers=buffers, host=host, host_weights=held, whole=whole, read_once=True
        )
    return Footprint(
        weights=weights,
        master=4.0 * part,
        adam=8.0 * part,
        average=average,
        buffers=bucket + gathered + width * part,  # gradients have a permanent buffer
        idle=(12.0 + width) * part,
        idle_host=3 * fp32 + _on_host(width * part, system.pin_memory),
        step=(width + 4 if width == 2 else 4) * min(part, ZERO3_SUB_GROUP),
        build=whole / world_size - weights,  # weights are loaded in parts, and then quantized
        whole=whole,
        read_once=True,
    )


def _on_host(size: float, pin: bool) -> float:
    """Return the bytes of a buffer in host memory: the next power of two if it is page-locked."""
    return float(next_power_of_two(math.ceil(size))) if pin and size > 0 else size


def _sub_groups(elements: float) -> list[float]:
    """Return the elements that ZeRO-3's optimizer steps at a time."""
    full, rest = divmod(elements, ZERO3_SUB_GROUP)
    return [float(ZERO3_SUB_GROUP)] * int(full) + [rest]


def _gathered(size: ModelSize, *, width: int, world_size: int, offload: bool) -> float:
    """Return the bytes of whole parameters that ZeRO-3 holds besides the parts.

    A single rank uses its only part in place.
    """
    if world_size == 1 and not offload:
        return 0.0
    return min(size.weight_bytes(width), width * (ZERO3_LIVE + size.largest))
