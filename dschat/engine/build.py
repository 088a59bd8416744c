"""The one call of deepspeed.initialize, and the process group and precision that go before it."""

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
from dschat.engine.compiled_ops import needed_ops
from dschat.engine.device import on_cpu
from dschat.engine.launch_env import process_variables, shared_buffers
from dschat.engine.optim import adamw
from dschat.models.structure import decoder_layers
from dschat.runtime import dist
from dschat.runtime.hardware import can_compile, threads_per_rank
from dschat.runtime.log import logger

# Where the environment has no DEEPSPEED_TIMEOUT (minutes): time to write 180 GB at 100 MB/s.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start_processes(local_rank: int = -1) -> torch.device:
    """Join the process group, and return this process's device.

    Under a launcher (deepspeed, torchrun, srun) its environment is used; a plain ``python main.py`` is a group of one.

    Raises:
        ValueError: an environment that lacks the first process's address, fewer devices than processes on this host, or a
            port in use.
    """
    os.environ.update(process_variables(os.environ, local_rank=local_rank))
    accelerator, place = get_accelerator(), int(os.environ["LOCAL_RANK"])
    # Before the group is made: NCCL binds a group to the device that is current then.
    if accelerator.device_name() != "cpu":
        if place >= accelerator.device_count():
            raise ValueError(
                f"LOCAL_RANK {place}: {accelerator.device_count()} {accelerator.device_name()} device(s) to be seen on this "
                "host. Start as many processes on it, or look at CUDA_VISIBLE_DEVICES."
            )
        accelerator.set_device(place)
    elif place == 0:
        _warn_of_stale_locks()
    try:
        # The others wait in a collective while the first process writes a model.
        timeout = {} if os.environ.get("DEEPSPEED_TIMEOUT") else dict(timeout=COLLECTIVE_TIMEOUT)
        deepspeed.init_distributed(**timeout)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"MASTER_ADDR:MASTER_PORT {address}: {error}. Give a free port of the first host."
        ) from error
    if on_cpu():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(dist.ranks_per_node()))
        # DeepSpeed's shared memory stays mapped without its name, and with it 66 MiB a process would outlive the run.
        torch.distributed.barrier()
        for file in shared_buffers(os.environ, rank=dist.rank()):
            file.unlink(missing_ok=True)
    return torch.device(accelerator.current_device_name())


def _warn_of_stale_locks() -> None:
    for op in needed_ops():
        if op.lock is not None:
            logger.warning(
                f"a build that was killed left {op.lock}, and this run may wait for it without end: python -m dschat.doctor "
                "--build_ops clears it"
            )


@contextlib.contextmanager
def partitioned_loading(ds_config: dict):
    """Inside, transformers' from_pretrained loads under ZeRO-3 straight into partitions; else as ever."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    keep = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference
    yield
    del keep


def override(ds_config: dict, path: str | None, flag: str = "--deepspeed_config") -> dict:
    """`ds_config` with the JSON file `path` merged over it, key by key.

    Raises:
        ValueError: no such file, no JSON object in it, or values that DeepSpeed does not take; names `flag`.
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
            f"{flag} {path}: {', '.join(clash)} follow from the batch-size and accumulation flags; take "
            "them out of the file."
        )
    merged = _merge(ds_config, extra)
    if not isinstance(zero := merged.get("zero_optimization", {}), dict):
        raise ValueError(
            f"{flag} {path}: zero_optimization is {json.dumps(zero)[:60]}, not an object."
        )
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # of pydantic: one line, then two lines a fault and a link
        faults = " ".join(
            line.strip() for line in str(error).splitlines()[1:] if "https://" not in line
        )
        raise ValueError(f"{flag} {path}: zero_optimization: {faults}.") from error
    halves = [merged.get(name) for name in ("fp16", "bf16")]
    if all(isinstance(half, dict) and half.get("enabled") for half in halves):
        raise ValueError(
            f"{flag} {path}: fp16 and bf16 are both enabled; leave the choice to --dtype."
        )
    return merged


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
    """A DeepSpeed engine around `model`, with AdamW and a schedule of transformers.

    Args:
        total_steps: optimizer steps of the whole run, the schedule's length.
        lora_names: names of LoRA parameters, which get `lora_learning_rate`.
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
    scheduler = get_scheduler(
        schedule.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=min(schedule.num_warmup_steps, total_steps),
        num_training_steps=max(total_steps, 1),
    )
    if ds_config["zero_optimization"]["stage"] == 3:
        _fetch_whole_layers(model, ds_config)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    if compile_layers and engine.zero_optimization_stage() < 3 and can_compile():
        _compile_layers(model)
    logger.info(
        f"{type(model).__name__}: {total / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M trained "
        f"({100 * trained / total:.1f}%), ZeRO-{engine.zero_optimization_stage()}, {dist.world_size()} process(es)"
    )
    return engine


def _fetch_whole_layers(model: torch.nn.Module, ds_config: dict) -> None:
    """Let ZeRO-3 gather each decoder layer in one collective, instead of each of its modules alone.

    Not if a part of a layer is frozen, as with LoRA: DeepSpeed (0.19.8) then frees parameters whose
    gradients are still to come. Nor with weights in host memory, where a layer may be too large.
    """
    layers = decoder_layers(model)[1]
    is_frozen = any(not p.requires_grad for p in layers.parameters())
    if not is_frozen and "offload_param" not in ds_config["zero_optimization"]:
        deepspeed.utils.set_z3_leaf_modules(model, sorted({type(x) for x in layers}, key=str))


def _compile_layers(model: torch.nn.Module) -> None:
    """Compile each decoder layer in place; equal layers share one compilation.

    Under ZeRO-3 it would not pay: DeepSpeed's hooks fetch weights inside the layer, and each hook
    would break the graph.
    """
    for layer in decoder_layers(model)[1]:
        layer.compile()


def build_inference_engine(model: torch.nn.Module, *, ds_config: dict):
    """A DeepSpeed engine around a model that is not trained; its parameters need no gradient and it is in eval mode."""
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    engine.eval()
    return engine


def _merge(base: dict, extra: dict) -> dict:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
