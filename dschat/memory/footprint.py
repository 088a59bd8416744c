"""The bytes that a step needs on each GPU and on each host, known before anything loads.

What is there between updates: weights, fp32 master weights and Adam's two moments, gradients,
buffers. What comes
and goes, by phase: building an engine, generation, scoring, the backward passes, the optimizer
steps, evaluation. The
peak is the largest phase on top of that. ZeRO (Rajbhandari et al. 2020, section 3) divides the
former by the
processes; the constants are those of DeepSpeed's optimizers and of engine/ds_config.py.
"""

import math
from dataclasses import dataclass

from dschat.config.options import SystemOptions
from dschat.engine.ds_config import training_config
from dschat.generation.kernels.limits import next_power_of_two
from dschat.memory.model_size import ModelSize

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
ZERO3_BUCKET = int(
    5e8
)  # DeepSpeed's default reduce_bucket_size; engine/ds_config.py sets it for stages 1 and 2 only
ZERO3_SUB_GROUP = int(1e9)  # elements that DeepSpeed's ZeRO-3 optimizer steps at a time
ZERO3_LIVE = int(3e7) * 2  # gathered parameters: stage3_max_live_parameters and one prefetch
ZERO12_BUCKET = int(1e8)


@dataclass(frozen=True)
class Footprint:
    """One model inside its engine: bytes of one process."""

    weights: float
    master: float = 0.0  # fp32 master weights
    adam: float = 0.0
    average: float = 0.0  # --enable_ema
    buffers: float = 0.0  # of communication, and gathered weights: always there, or at any time
    gradients: float = 0.0  # from the end of a backward to the optimizer step
    waiting: float = (
        0.0  # gradients of earlier micro-batches, and their bucket, during forward and backward
    )
    early: float = (
        0.0  # gradients and bucket of this one that stand beside the activations in backward
    )
    reduce: float = 0.0  # beside the gradients at the end of a backward
    step: float = 0.0  # beside the gradients in the optimizer step
    freed: float = 0.0  # of the gradients, what is gone by then: `step` is less by it
    build: float = 0.0  # beside the weights while the engine is built
    host: float = 0.0
    host_weights: float = 0.0  # of that, the weights
    whole: float = 0.0  # all weights, as they are read into host memory
    read_once: bool = False  # by one process of all, instead of by each
    idle: float = (
        0.0  # of what is resident, what --offload_idle_states moves to the host between updates
    )
    idle_host: float = 0.0  # what that takes there

    @property
    def resident(self) -> float:
        """Bytes on the GPU between updates."""
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
    """Return the footprint of a model that only evaluates: partitioned under ZeRO-3 or if
    offloaded, else whole.
    """
    whole, held = width * size.parameters, size.weight_bytes(width)
    if stage != 3 and not offload:
        return Footprint(weights=held, buffers=width * size.largest_int8, whole=whole)
    part = held / world_size
    gathered = _gathered(size, width=width, world_size=world_size, offload=offload)
    host = part * (size.rounding if pin_memory else 1.0) if offload else 0.0
    return Footprint(
        weights=0.0 if offload else part,
        buffers=gathered + width * size.largest_int8,
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
        accumulation: micro-batches per optimizer step.
        average: a moving average of the trained weights is kept.
    """
    width = WIDTHS[dtype]
    stage = training_stage(system, dtype=dtype)
    if stage == 0:  # plain AdamW on fp32 weights
        trained = 4.0 * size.trained
        return Footprint(
            weights=size.weight_bytes(4),
            whole=4.0 * size.parameters,
            buffers=4.0 * size.largest_int8,
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
    """Return the ZeRO stage that training really runs at: stage 0 with half precision or offload is
    stage 1.
    """
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
    whole, part = width * size.trained, width * size.trained / world_size
    group = max(size.groups) / world_size
    bucket = width * ZERO12_BUCKET
    # Stage 1 keeps whole gradients until the end of the last backward. Stage 2 hands them on: to
    # its own part, which is
    # there from the first full bucket on, or, offloaded, to the host.
    held = whole if stage == 1 else 0.0 if system.offload else part
    waits = accumulates and (stage == 1 or not system.offload)
    waiting = held + (bucket if stage == 1 else 0.0) if waits else 0.0
    early = (0.0 if waits and stage == 1 else bucket) + (held if stage == 2 else 0.0)
    # The optimizer copies each group's weights into one flat tensor, one group after the other.
    build = width * max(size.groups)
    shared = dict(
        weights=size.weight_bytes(width),
        whole=width * size.parameters,
        gradients=held,
        waiting=waiting,
        early=early,
        build=build,
    )
    dense = width * size.largest_int8  # one int8 matrix, as it is multiplied
    shares = [group / world_size for group in size.groups]
    # fp32 weights, and gradients as large; each group's are one buffer.
    fp32 = sum(_on_host(4 * share, system.pin_memory) for share in shares)
    if system.offload:
        trained = size.trained / world_size
        in_width = sum(_on_host(width * share, system.pin_memory) for share in shares)
        return Footprint(
            **shared,
            buffers=width * size.largest_trained + dense,
            reduce=bucket,
            # Also two moments, and weights in `width`; further gradients, one by one, while they
            # accumulate.
            host=2 * fp32
            + 8 * trained
            + in_width
            + average
            + (whole * (size.rounding if system.pin_memory else 1.0) if accumulates else 0.0),
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
        # A group's gradients, flat, and once more in fp32; the other processes' are gone by then.
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
    weights, part = size.weight_bytes(width) / world_size, size.trained / world_size
    gathered = (
        _gathered(size, width=width, world_size=world_size, offload=system.offload)
        + width * size.largest_int8
    )
    bucket = width * ZERO3_BUCKET
    shares = [group / world_size for group in size.groups]
    fp32 = sum(
        _on_host(4 * chunk, system.pin_memory) for share in shares for chunk in _sub_groups(share)
    )
    if system.offload:
        # Frozen weights lie one by one, trained ones flat and page-locked in any case.
        frozen = (weights - width * part) * (size.rounding if system.pin_memory else 1.0)
        held = frozen + sum(_on_host(width * share, True) for share in shares)
        # fp32 weights and two moments; gradients of all in `width`, and of the steps' groups in
        # fp32.
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
        buffers=bucket + gathered + width * part,  # gradients have a place of their own
        idle=(12.0 + width) * part,
        idle_host=3 * fp32 + _on_host(width * part, system.pin_memory),
        step=(width + 4 if width == 2 else 4) * min(part, ZERO3_SUB_GROUP),
        build=whole / world_size - weights,  # weights are loaded in pieces, and then become int8
        whole=whole,
        read_once=True,
    )


def _on_host(size: float, pin: bool) -> float:
    """Bytes of a buffer in host memory; page-locked, torch takes the next power of two."""
    return float(next_power_of_two(math.ceil(size))) if pin and size > 0 else size


def _sub_groups(elements: float) -> list[float]:
    """Return the elements that ZeRO-3's optimizer steps at a time."""
    full, rest = divmod(elements, ZERO3_SUB_GROUP)
    return [float(ZERO3_SUB_GROUP)] * int(full) + [rest]


def _gathered(size: ModelSize, *, width: int, world_size: int, offload: bool) -> float:
    """Return the bytes of whole parameters that ZeRO-3 holds beside the parts.

    A single rank uses its only part in place.
    """
    if world_size == 1 and not offload:
        return 0.0
    return min(size.weight_bytes(width), width * (ZERO3_LIVE + size.largest))
