"""The memory plan as text, whether it fits, and what would make it fit."""

import itertools
import math
from dataclasses import replace

from dschat.config.steps import PPOConfig
from dschat.engine.memory_plan import StepPlan, plan_step
from dschat.engine.model_size import find_config
from dschat.engine.tensor_parallel import split_problems
from dschat.tracking.report import table

GIB = 2**30
# Beside tensors: the CUDA context, the libraries' workspaces, communication buffers.
OVERHEAD = 0.75 * GIB
MOST_REMEDIES = 3
LORA_DIM = 64


def needed_bytes(plan: StepPlan) -> float:
    """What a GPU must hold."""
    return plan.peak[1] + OVERHEAD


def plan_text(plan: StepPlan, *, processes: int, gpu_bytes: float = 0.0, all_host_bytes: float = 0.0) -> str:
    """The plan as a table, with a verdict.

    Args:
        processes: on one host.
        gpu_bytes: memory of a GPU; 0 where it is not known.
        all_host_bytes: memory of the host; 0 where it is not known.
    """
    columns = ("weights", "master", "adam", "average", "gradients", "buffers", "host")
    rows = [
        [name, f"{plan.sizes[name].parameters / 1e6:,.0f}", f"{plan.sizes[name].trained / 1e6:,.0f}"]
        + [_gib(getattr(model, column)) for column in columns]
        for name, model in plan.models.items()
    ]
    header = ["GiB a process", "M param.", "trained", "weights", "fp32", "Adam", "EMA", "gradients", "buffers", "host"]
    phase, peak = plan.peak
    others = "".join(f"{name} {_gib(size)} GiB, " for name, size in plan.resident.items() if size)
    phases = ", ".join(f"{name} {_gib(size)}" for name, size in plan.phases.items())
    verdict = f"needs {_gib(needed_bytes(plan))} GiB on a GPU"
    if gpu_bytes:
        verdict += f" of {_gib(gpu_bytes)} GiB: {'fits' if needed_bytes(plan) <= gpu_bytes else 'does not fit'}"
    host = plan.host_bytes(processes=processes)
    verdict += f"; {_gib(host)} GiB of host memory for {processes} process(es)"
    if all_host_bytes:
        verdict += f" of {_gib(all_host_bytes)} GiB: {'fits' if host <= all_host_bytes else 'does not fit'}"
    return "\n".join(
        [
            table(rows, header=header),
            f"{others}peak by phase: {phases}",
            f"peak {_gib(peak)} GiB ({phase}); {verdict}",
        ]
    )


def check_fit(
    config, plan: StepPlan, *, world_size: int, processes: int, dtype: str, gpu_bytes: float, all_host_bytes: float
) -> None:
    """Nothing where the plan fits.

    Raises:
        ValueError: it does not; names the flags that would make it fit.
    """
    limits = (gpu_bytes, all_host_bytes)
    if _fits(plan, processes, *limits):
        return
    found = remedies(config, world_size=world_size, processes=processes, dtype=dtype, limits=limits)
    if found is None:
        advice = f"None of the usual flags makes it fit {world_size} GPU(s): take more GPUs, or a smaller model."
    else:
        flags, fitting = found
        advice = f"It fits with {' '.join(flags)} ({_gib(needed_bytes(fitting))} GiB)."
    phase, _ = plan.peak
    needs = f"{_gib(needed_bytes(plan))} GiB on each GPU ({phase})"
    needs += f" of {_gib(gpu_bytes)} GiB" if gpu_bytes else ""
    if all_host_bytes:
        needs += f", and {_gib(plan.host_bytes(processes=processes))} GiB of {_gib(all_host_bytes)} GiB host memory"
    raise ValueError(
        f"This run does not fit: it needs {needs}. {advice} --ignore_memory_plan starts it all the same."
    )


def remedies(
    config, *, world_size: int, processes: int, dtype: str, limits: tuple[float, float]
) -> tuple[list[str], StepPlan] | None:
    """The fewest and mildest flags, three groups at most, with which `config` fits, and the plan with them; or None.

    Args:
        limits: bytes of a GPU and of a host.
    """
    changes = _changes(config, world_size=world_size)
    for count in range(1, MOST_REMEDIES + 1):
        for chosen in itertools.combinations(changes, count):
            changed = config
            for change in chosen:
                changed = with_options(changed, change)
            if changed.problems():
                continue
            plan = plan_step(changed, world_size=world_size, dtype=dtype)
            if _fits(plan, processes, *limits):
                return [word for change in chosen for word in _words(change)], plan
    return None


def with_options(config, options: dict):
    """`config` with fields of its groups replaced, by their flags' names."""
    groups = {}
    for name, group in vars(config).items():
        mine = {key: value for key, value in options.items() if hasattr(group, key)}
        groups[name] = replace(group, **mine)
    return type(config)(**groups)


def _changes(config, *, world_size: int) -> list[dict]:
    """What saves memory, mildest first, without what `config` has already."""
    system, batch, schedule = config.system, config.batch, config.schedule
    steps = schedule.gradient_accumulation_steps
    if not isinstance(config, PPOConfig):
        rows = batch.per_device_train_batch_size
        found = [
            {"gradient_checkpointing": True},
            {"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 4)},
            *({"per_device_train_batch_size": few, "gradient_accumulation_steps": steps * rows // few} for few in _few(rows)),
            {"zero_stage": 3} if world_size > 1 else {},
            {"offload_reference_model": True} if hasattr(system, "offload_reference_model") else {},
            {"lora_dim": config.lora.lora_dim or LORA_DIM, "only_optimize_lora": True},
            {"offload": True, "zero_stage": max(system.zero_stage, 2)},
            {"offload": True, "zero_stage": 3},
        ]
    else:
        rows, answers = batch.per_device_training_batch_size, batch.per_device_generation_batch_size
        lora = config.lora
        found = [
            {"actor_gradient_checkpointing": True, "critic_gradient_checkpointing": True},
            {"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 8)},
            *(
                {"per_device_training_batch_size": few, "gradient_accumulation_steps": steps * rows // few}
                for few in _few(rows)
            ),
            *(
                {"per_device_generation_batch_size": few, "generation_batches": batch.generation_batches * answers // few}
                for few in _few(answers)
            ),
            {"release_inference_cache": True} if system.enable_hybrid_engine else {},
            {"offload_idle_states": True},
            {"actor_zero_stage": 3, "critic_zero_stage": 3} if world_size > 1 else {},
            *_splits(config, world_size=world_size),
            {
                "actor_lora_dim": lora.actor_lora_dim or LORA_DIM,
                "critic_lora_dim": lora.critic_lora_dim or LORA_DIM,
                "only_optimize_lora": True,
            },
            {"offload_reference_model": True, "offload_reward_model": True},
            {"offload": True, "actor_zero_stage": 3, "critic_zero_stage": 3},
        ]
    now = {key: value for group in vars(config).values() for key, value in vars(group).items()}
    new = [{key: value for key, value in change.items() if now[key] != value} for change in found]
    return [change for change in new if change]


def _splits(config: PPOConfig, *, world_size: int) -> list[dict]:
    """Sizes of tensor-parallel groups, larger than now, that the actor and the processes can be split into."""
    if not config.system.enable_hybrid_engine:
        return []
    model = config.model
    actor = find_config(
        model.actor_model_name_or_path, flag="--actor_model_name_or_path", trust_remote_code=model.trust_remote_code
    )
    sizes = [size for size in (2, 4, 8) if size > config.system.inference_tp_size]
    return [{"inference_tp_size": size} for size in sizes if not split_problems(actor, size, world_size=world_size)]


def _few(rows: int) -> list[int]:
    """Smaller numbers of rows that divide `rows`: about half, a quarter, and one."""
    return sorted({math.gcd(rows, rows // part) for part in (2, 4, rows) if rows >= part > 1}, reverse=True)


def _words(change: dict) -> list[str]:
    return [f"--{key}" if value is True else f"--{key} {value}" for key, value in change.items()]


def _fits(plan: StepPlan, processes: int, gpu_bytes: float, all_host_bytes: float) -> bool:
    on_gpu = not gpu_bytes or needed_bytes(plan) <= gpu_bytes
    return on_gpu and (not all_host_bytes or plan.host_bytes(processes=processes) <= all_host_bytes)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.095 * GIB or size == 0 else f"{size / GIB:.3f}"
