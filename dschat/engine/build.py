"""Start the process group, and build DeepSpeed engines around models."""

import contextlib
import json
import os
from collections.abc import Container
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from dschat.config.options import ScheduleOptions
from dschat.engine.compiled_ops import load_ops_of_every_run
from dschat.engine.device import on_cpu
from dschat.engine.launch_env import process_variables, shared_buffers
from dschat.engine.optim import adamw
from dschat.models.lora import expert_adapters
from dschat.models.structure import decoder_layers
from dschat.runtime import dist
from dschat.runtime.hardware import can_compile, threads_per_rank
from dschat.runtime.log import logger

# If DEEPSPEED_TIMEOUT (minutes) is not set. Enough to write 180 GB at 100 MB/s.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start_processes(local_rank: int = -1) -> torch.device:
    """Join the process group, and return this rank's device.

    The rank comes from the environment of a launcher (deepspeed, torchrun, srun); a plain
    ``python main.py`` is a group of one.

    Args:
        local_rank: the flag of old launchers; -1 if it is not given.

    Raises:
        ValueError: the environment lacks the address of rank 0, this host has fewer devices than
            ranks, or the port is in use.
    """
    os.environ.update(process_variables(os.environ, local_rank=local_rank))
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    # Set the device before the group is made: NCCL binds a group to the current device.
    if accelerator.device_name() != "cpu":
        count = accelerator.device_count()
        if local_rank >= count:
            raise ValueError(
                f"LOCAL_RANK {local_rank}: this host shows {count} {accelerator.device_name()} "
                "device(s). Start no more processes on it than that, or check "
                "CUDA_VISIBLE_DEVICES."
            )
        accelerator.set_device(local_rank)
    load_ops_of_every_run()
    try:
        # The other ranks wait in a collective while rank 0 writes a model.
        timeout = {} if os.environ.get("DEEPSPEED_TIMEOUT") else dict(timeout=COLLECTIVE_TIMEOUT)
        with contextlib.redirect_stdout(None):  # DeepSpeed prints that it loaded an operator
            deepspeed.init_distributed(**timeout)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"MASTER_ADDR:MASTER_PORT {address}: {error}. Give a free port of the first host."
        ) from error
    if on_cpu():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(dist.ranks_per_node()))
        # Each rank's 66 MiB of shared memory would outlive the run. Without its file it stays
        # mapped until the process ends.
        torch.distributed.barrier()
        for file in shared_buffers(os.environ, rank=dist.rank()):
            file.unlink(missing_ok=True)
    return torch.device(accelerator.current_device_name())


@contextlib.contextmanager
def partitioned_loading(ds_config: dict):
    """Make transformers' from_pretrained load straight into partitions, if the stage is ZeRO-3."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    keep = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference
    yield
    del keep


def override(ds_config: dict, path: str | None, flag: str = "--deepspeed_config") -> dict:
    """Return `ds_config` with the JSON file `path` merged over it, key by key.

    Args:
        ds_config: the configuration that follows from the other flags.
        path: the file; None: `ds_config` is returned as it is.
        flag: the flag that gave `path`, for messages.

    Raises:
        ValueError: the file does not exist or holds no JSON object, or DeepSpeed refuses a value.
    """
    if path is None:
        return ds_config
    try:
        extra = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if not isinstance(extra, dict):
        raise ValueError(f"{flag} {path}: expected a JSON object, found {type(extra).__name__}.")
    owned = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    clash = [key for key in owned if key in extra and extra[key] != ds_config[key]]
    if clash:
        raise ValueError(
            f"{flag} {path}: {', '.join(clash)} follow from the batch-size and accumulation "
            "flags. Remove them from the file."
        )
    merged = _merge(ds_config, extra)
    fault = _zero_fault(merged.get("zero_optimization", {})) or _precision_fault(merged)
    if fault:
        raise ValueError(f"{flag} {path}: {fault}.")
    return merged


def _zero_fault(zero) -> str:
    """Return why DeepSpeed would refuse the section `zero_optimization`, or ""."""
    if not isinstance(zero, dict):
        return f"zero_optimization is {json.dumps(zero)[:60]}, not an object"
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        # pydantic's message: one line, then two lines and a link for each fault.
        lines = str(error).splitlines()[1:]
        faults = " ".join(line.strip() for line in lines if "https://" not in line)
        return f"zero_optimization: {faults}"
    return ""


def _precision_fault(config: dict) -> str:
    """Return a message if fp16 and bf16 are both enabled, else ""."""
    for name in ("fp16", "bf16"):
        section = config.get(name)
        if not isinstance(section, dict) or not section.get("enabled"):
            return ""
    return "fp16 and bf16 are both enabled; leave the choice to --dtype"


def build_training_engine(
    model: torch.nn.Module,
    *,
    ds_config: dict,
    schedule: ScheduleOptions,
    total_steps: int,
    learning_rate: float,
    weight_decay: float,
    lora_names: Container[str] = frozenset(),
    lora_learning_rate: float = 0.0,
    compile_layers: bool = False,
):
    """Return a DeepSpeed engine that trains `model`, with AdamW and a schedule of transformers.

    Args:
        model: the module; only parameters that require gradients are trained.
        ds_config: DeepSpeed's configuration.
        schedule: the kind of the schedule and its warm-up.
        total_steps: optimizer steps of the whole run, the schedule's length.
        learning_rate: of the parameters that are not LoRA's.
        weight_decay: of matrices; vectors do not decay.
        lora_names: names of LoRA parameters.
        lora_learning_rate: of those.
        compile_layers: train with compiled decoder layers, on a GPU and below ZeRO-3.
    """
    optimizer = adamw(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lora_names=lora_names,
        lora_learning_rate=lora_learning_rate,
        cpu_offload=bool(ds_config["zero_optimization"].get("offload_optimizer")) and not on_cpu(),
    )
    scheduler = make_scheduler(optimizer, schedule, total_steps=total_steps)
    if ds_config["zero_optimization"]["stage"] == 3:
        _fetch_whole_layers(model, ds_config)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    if compile_layers and engine.zero_optimization_stage() < 3 and can_compile():
        _compile_layers(model)
    _log_sizes(model, stage=engine.zero_optimization_stage())
    return engine


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleOptions, *, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return transformers' learning-rate schedule for a run of `total_steps` updates.

    A warm-up starts at rate 0 and is cut to the run's length. A run that never reaches its learning
    rate is warned of.
    """
    warmup = schedule.warmup_updates(total_steps)
    if schedule.lr_scheduler_type != "constant" and warmup:
        _log_warmup(schedule, warmup=warmup, total_steps=total_steps)
    length = max(total_steps, 1)
    if schedule.lr_scheduler_type == "polynomial" and warmup == length:
        length += 1  # transformers divides by the updates after the warm-up
    return get_scheduler(
        schedule.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=length,
    )


def _log_warmup(schedule: ScheduleOptions, *, warmup: int, total_steps: int) -> None:
    """Say what a warm-up does to a run of `total_steps` updates, of which the first has rate 0."""
    name, value = "--num_warmup_steps", str(schedule.num_warmup_steps)
    shorter = str(max(total_steps // 10, 1))
    if schedule.warmup_ratio is not None:
        name, value, shorter = "--warmup_ratio", str(schedule.warmup_ratio), "0.1"
    if total_steps == 1:
        logger.warning(
            f"{name} {value}: the only update of this run has learning rate 0, so the model does "
            f"not change. Give {name} 0."
        )
    elif warmup == total_steps:
        logger.warning(
            f"{name} {value}: this run has {total_steps} updates and never reaches its learning "
            f"rate. Give {name} {shorter}, or train longer."
        )
    else:
        logger.info(
            f"{name} {value}: {warmup} of {total_steps} updates warm up; the first has learning "
            "rate 0"
        )


def _log_sizes(model: torch.nn.Module, *, stage: int) -> None:
    """Log how many parameters the model has, and how many of them are trained."""
    total, trained = 0, 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        if parameter.requires_grad:
            trained += size
    logger.info(
        f"{type(model).__name__}: {total / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M trained "
        f"({100 * trained / total:.1f}%), ZeRO-{stage}, {dist.world_size()} process(es)"
    )


def _fetch_whole_layers(model: torch.nn.Module, ds_config: dict) -> None:
    """Let ZeRO-3 gather each decoder layer in one collective, instead of each of its modules alone.

    Not if a part of a layer is frozen, as with LoRA: DeepSpeed (0.19.8) then frees parameters whose
    gradients are still to come. Nor with weights in host memory: a layer may be too large.
    """
    layers = decoder_layers(model)[1]
    is_frozen = any(not p.requires_grad for p in layers.parameters())
    if not is_frozen and "offload_param" not in ds_config["zero_optimization"]:
        deepspeed.utils.set_z3_leaf_modules(model, sorted({type(x) for x in layers}, key=str))


def _compile_layers(model: torch.nn.Module) -> None:
    """Compile each decoder layer in place; equal layers share one compilation.

    Not if experts have adapters: PEFT changes their module in each forward pass, and that would
    break the graph. Under ZeRO-3 it would not pay: DeepSpeed's hooks fetch weights inside the
    layer, and each hook would break the graph.
    """
    for layer in decoder_layers(model)[1]:
        if not expert_adapters(layer):
            layer.compile()


def build_inference_engine(model: torch.nn.Module, *, ds_config: dict):
    """Return a DeepSpeed engine in evaluation mode; its parameters require no gradients."""
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    engine.eval()
    return engine


def _merge(base: dict, extra: dict) -> dict:
    """Return `base` with the values of `extra`; an object in both is merged in turn."""
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
