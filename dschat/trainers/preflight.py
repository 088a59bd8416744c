"""The memory plan of a run, before models load, and --dry_run."""

import contextlib
import json
import os
from collections.abc import Iterable

import psutil
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from dschat.config.ppo import PPOConfig
from dschat.config.sft import SFTConfig
from dschat.engine.build import override
from dschat.engine.ds_config import training_config
from dschat.memory.advice import GIB, Machine, find_remedy, needed_bytes, with_options
from dschat.memory.checks import checked_plan
from dschat.memory.model_size import has_shape
from dschat.memory.plan import plan_step
from dschat.memory.report import check_fit, plan_text, with_sizes
from dschat.models.tokenizer import model_source
from dschat.runtime import dist
from dschat.runtime.log import logger

EXAMPLE_NAMES = ("facebook/opt-1.3b", "meta-llama/Llama-2-7b-hf")


def fitted(config):
    """Return `config` with the flags of --fit auto, which make the run fit the GPUs.

    They cost speed and change nothing that is learned: the rows of an update and of a rollout stay
    the same. If none suffice, `config` is returned as it is, and ``show_plan`` says what would. The
    process group must have been initialized.
    """
    if config.run.fit == "none":
        return config
    machine = _this_machine()
    if not machine.gpu_bytes:
        logger.info("--fit auto has no effect on a CPU")
        return config
    dtype = "bf16" if config.model.dtype == "auto" else config.model.dtype  # fp16 is as wide
    plan = plan_step(config, world_size=machine.world_size, dtype=dtype)
    needs = f"{needed_bytes(plan) / GIB:.1f} of {machine.gpu_bytes / GIB:.1f} GiB on each GPU"
    if not machine.missing(plan):
        logger.info(f"--fit auto: the run fits as it is, with {needs}")
        return config
    found = find_remedy(config, machine, dtype=dtype, same_results=True)
    if found.missing:
        logger.info(
            f"--fit auto: no flags that keep the results make the run fit: it needs {needs}"
        )
        return config
    logger.info(
        f"--fit auto: the run needs {needs}, so it takes {with_sizes(found, machine)}. It learns "
        "the same"
    )
    return with_options(config, found.options)


def _this_machine() -> Machine:
    """Return the resources of this run: the smallest GPU and host of all ranks; 0 on a CPU."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    if not torch.cuda.is_available():
        return Machine(dist.world_size(), processes, 0.0, 0.0)
    gpu = float(torch.cuda.get_device_properties(0).total_memory)
    host = float(psutil.virtual_memory().total)
    sizes = [(gpu, host)]
    if dist.has_peers():
        sizes *= dist.world_size()
        torch.distributed.all_gather_object(sizes, (gpu, host))
    return Machine(
        dist.world_size(), processes, min(gpu for gpu, _ in sizes), min(host for _, host in sizes)
    )


def show_plan(config, *, dtype: str, rewards: Iterable[str] = ()) -> dict[str, float]:
    """Log the memory plan of a run. The process group must have been initialized.

    The plan is of GPUs: on a CPU only the options are checked.

    Args:
        config: of the run.
        dtype: "fp16", "bf16" or "fp32".
        rewards: step 3's reward models that read the actor's tokens.

    Returns:
        The planned GiB of "a GPU" and "a host"; empty on a CPU.

    Raises:
        ValueError: the run does not fit the GPU, and --ignore_memory_plan is not given; names flags
            that help. In step 3 also if shapes of models do not fit the options.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    gpu_bytes = (
        float(torch.cuda.get_device_properties(0).total_memory)
        if torch.cuda.is_available()
        else 0.0
    )
    limits = dict(
        gpu_bytes=gpu_bytes,
        all_host_bytes=float(psutil.virtual_memory().total) if gpu_bytes else 0.0,
    )
    plan = checked_plan(config, world_size=dist.world_size(), dtype=dtype, rewards=rewards)
    if not gpu_bytes:
        logger.info("memory plan: none on a CPU; python -m dschat.plan plans for GPUs")
        return {}
    logger.info("memory plan\n" + plan_text(plan, processes=processes, **limits))
    if not config.run.ignore_memory_plan:
        check_fit(
            config, plan, world_size=dist.world_size(), processes=processes, dtype=dtype, **limits
        )
    return {
        "a GPU": needed_bytes(plan) / GIB,
        "a host": plan.host_bytes(processes=processes) / GIB,
    }


def dry_run(config) -> None:
    """Print the memory plan and the DeepSpeed configurations for $WORLD_SIZE GPUs.

    Loads no model, downloads nothing and starts no process group.

    Raises:
        ValueError: the shape of a model is not known, or ``checked_plan`` refuses the options.
    """
    check_shapes_known(config.model.by_flag)
    with _hub_offline():
        _show_dry_run(config)


def _show_dry_run(config) -> None:
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"WORLD_SIZE={given}: expected the number of GPUs to plan for, at least 1."
        )
    world_size = int(given)
    dtype = "bf16" if config.model.dtype == "auto" else config.model.dtype
    plan = checked_plan(config, world_size=world_size, dtype=dtype)
    print(f"memory plan for {world_size} GPU(s) in {dtype}; planned, not run")
    print(plan_text(plan, processes=min(world_size, 8)))
    for name, found in ds_configs(config, dtype=dtype, world_size=world_size).items():
        print(f"DeepSpeed configuration of the {name}:\n{json.dumps(found, indent=2)}")


def check_shapes_known(models: dict[str, list[str]]) -> None:
    """Check that the shape of every model can be found without the hub.

    Args:
        models: folders or hub ids by flag.

    Raises:
        ValueError: a shape is not known; names every such model.
    """
    found = [
        f"{flag} {name}: --dry_run does not access the hub, and this is not a folder, not a "
        "published size and not in the hub's cache. Give its folder, or a name such as "
        f"{', '.join(EXAMPLE_NAMES)}."
        for flag, names in models.items()
        for name in names
        if name and not (model_source(name, flag=flag)[1] or has_shape(name) or _is_cached(name))
    ]
    if found:
        raise ValueError("\n".join(found))


@contextlib.contextmanager
def _hub_offline():
    """Within the block, read from the hub's cache without contacting the hub."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_cached(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def ds_configs(config, *, dtype: str, world_size: int) -> dict[str, dict]:
    """Return the DeepSpeed configuration of each model that a step trains on GPUs.

    Returns:
        By name: "model", or "actor" and "critic" in step 3.
    """
    rows, steps = config.batch.layout(config.schedule.gradient_accumulation_steps)
    shared = dict(
        dtype=dtype,
        world_size=world_size,
        on_cpu=False,
        tensorboard_path=config.run.tensorboard_path if config.run.enable_tensorboard else None,
    )
    if not isinstance(config, PPOConfig):
        step = 1 if isinstance(config, SFTConfig) else 2
        found = training_config(
            config.system,
            micro_batch_size=rows,
            gradient_accumulation_steps=steps,
            tensorboard_name=f"step{step}_model",
            **shared,
        )
        return {"model": override(found, *config.run.deepspeed_file)}
    systems = {"actor": config.actor_system}
    if config.has_critic:
        systems["critic"] = config.critic_system
    configs = {}
    for role, system in systems.items():
        found = training_config(
            system,
            micro_batch_size=rows,
            gradient_accumulation_steps=steps,
            tensorboard_name=f"step3_{role}",
            **shared,
        )
        configs[role] = override(found, *config.run.deepspeed_file)
    return configs
