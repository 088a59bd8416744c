"""Advice on the flags that make a run fit: every set of a few flags is planned, and the smallest
and mildest that fits is taken.

Where no small set does, whole kinds of changes are planned together, and what is not needed is left
out again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dschat.config.ppo import PPOConfig
from dschat.generation.tensor_parallel import split_problems
from dschat.memory.model_size import find_config
from dschat.memory.plan import StepPlan, plan_step

GIB = 2**30
# Beside tensors: the CUDA context, the libraries' workspaces, communication buffers.
OVERHEAD = 0.75 * GIB
PLANNED_FLAGS = 4  # of up to so many flags every set is planned, which takes about a second
MOST_GPUS = 1024
GPUS_OF_A_HOST = 8
LORA_DIM = 64


@dataclass(frozen=True)
class Change:
    """Options that only make sense together, by their flags' names."""

    options: dict
    cost: int  # of speed or quality: 0 next to nothing, 5 much


@dataclass(frozen=True)
class Machine:
    """The resources that a run may use."""

    world_size: int  # processes, one GPU each
    processes: int  # of them on one host
    gpu_bytes: float  # memory of a GPU; 0 where it is not known
    all_host_bytes: float  # of a host; likewise

    def missing(self, plan: StepPlan) -> float:
        """Bytes by which `plan` does not fit a GPU and a host, together; 0 where it fits."""
        gpu = needed_bytes(plan) - self.gpu_bytes if self.gpu_bytes else 0.0
        host = (
            plan.host_bytes(processes=self.processes) - self.all_host_bytes
            if self.all_host_bytes
            else 0.0
        )
        return max(gpu, 0.0) + max(host, 0.0)


@dataclass(frozen=True)
class Remedy:
    """Options, the plan with them, and the bytes by which that does not fit."""

    options: dict
    plan: StepPlan
    missing: float

    @property
    def flags(self) -> list[str]:
        """Each flag with its value."""
        return [
            f"--{'' if value else 'no_'}{key}" if isinstance(value, bool) else f"--{key} {value}"
            for key, value in self.options.items()
        ]


def needed_bytes(plan: StepPlan) -> float:
    """Return the bytes that a GPU must hold."""
    return plan.peak[1] + OVERHEAD


def find_remedy(config, machine: Machine, *, dtype: str) -> Remedy:
    """Find the fewest flags with which `config` fits, of equally few the mildest; if nothing fits,
    the nearest miss.

    Up to PLANNED_FLAGS flags no smaller set of these changes fits; of more, none can be left out.

    Raises:
        ValueError: a model that is not known here.
    """
    kinds = _kinds(config, world_size=machine.world_size)
    planned = functools.partial(_planned, config, machine=machine, dtype=dtype)
    nearest = planned({})
    for options in _small_sets(kinds):
        found = planned(options)
        if found and not found.missing:
            return found
        nearest = _nearer(nearest, found)
    for options in _large_sets(kinds):
        nearest = _nearer(nearest, planned(options))
        if not nearest.missing:
            break
    return _without_needless(nearest, kinds, planned)


def enough_gpus(config, machine: Machine, *, dtype: str) -> tuple[Machine, Remedy] | None:
    """Twice, four times ... as many GPUs, whichever do first, with the flags with which `config`
    fits them; or None.
    """
    world_size = 2 * machine.world_size
    while world_size <= MOST_GPUS:
        processes = min(world_size, max(machine.processes, GPUS_OF_A_HOST))
        larger = replace(machine, world_size=world_size, processes=processes)
        planned = functools.partial(_planned, config, machine=larger, dtype=dtype)
        kinds = _kinds(config, world_size=world_size)
        fitting = (
            found for found in map(planned, _large_sets(kinds)) if found and not found.missing
        )
        first = next(fitting, None)
        if first:
            return larger, _without_needless(first, kinds, planned)
        world_size *= 2
    return None


def with_options(config, options: dict):
    """Return `config` with fields of its groups replaced, by their flags' names."""
    groups = {}
    for name, group in vars(config).items():
        mine = {key: value for key, value in options.items() if hasattr(group, key)}
        groups[name] = replace(group, **mine) if mine else group
    return type(config)(**groups)


def _planned(config, options: dict, *, machine: Machine, dtype: str) -> Remedy | None:
    """Return the remedy that `options` amount to; None if they exclude each other."""
    changed = with_options(config, options)
    if changed.problems():
        return None
    plan = plan_step(
        changed, world_size=machine.world_size, dtype="bf16" if "dtype" in options else dtype
    )
    return Remedy(options, plan, machine.missing(plan))


def _nearer(one: Remedy | None, other: Remedy | None) -> Remedy | None:
    """Return the remedy that is nearer to fit, the first of two equals."""
    return other if other and (one is None or other.missing < one.missing) else one


def _small_sets(kinds: list[list[Change]]) -> list[dict]:
    """Return all sets of changes with up to PLANNED_FLAGS flags: those of few flags first, of
    equally few the mildest.
    """
    changes = [change for kind in kinds for change in kind]
    sets = (
        chosen
        for count in range(1, PLANNED_FLAGS + 1)
        for chosen in itertools.combinations(changes, count)
    )
    return [options for options in _in_order(sets) if len(options) <= PLANNED_FLAGS]


def _large_sets(kinds: list[list[Change]]) -> list[dict]:
    """Return all sets of whole kinds, each at its strongest, in the same order."""
    strongest = [_strongest(kind) for kind in kinds]
    sets = (
        chosen
        for count in range(1, len(kinds) + 1)
        for chosen in itertools.combinations(strongest, count)
    )
    return _in_order(itertools.chain(*chosen) for chosen in sets)


def _in_order(sets: Iterable[Iterable[Change]]) -> list[dict]:
    """Return the options of each set, except sets that give a flag two values."""
    found = []
    for chosen in sets:
        options, count, cost = {}, 0, 0
        for change in chosen:
            options |= change.options
            count, cost = count + len(change.options), cost + change.cost
        if len(options) == count:
            found.append((count, cost, options))
    return [options for _, _, options in sorted(found, key=lambda item: item[:2])]


def _strongest(kind: list[Change]) -> list[Change]:
    """Keep the last of the changes of the same flags."""
    return list({tuple(change.options): change for change in kind}.values())


def _without_needless(found: Remedy, kinds: list[list[Change]], planned: Callable) -> Remedy:
    """Return `found` without the changes, the costliest first, that bring it no nearer to fit, or
    with milder ones in their place.
    """
    chosen = [
        change
        for kind in kinds
        for change in _strongest(kind)
        if change.options.items() <= found.options.items()
    ]
    for change in sorted(chosen, key=lambda change: -change.cost):
        same_flags = [
            other.options
            for kind in kinds
            for other in kind
            if other.options.keys() == change.options.keys()
        ]
        for milder in ({}, *same_flags):
            kept = [key for key in found.options if key in milder or key not in change.options]
            rest = {key: milder.get(key, found.options[key]) for key in kept}
            less = planned(rest)
            if less and less.missing <= found.missing:
                found = less
                break
    return found


def _kinds(config, *, world_size: int) -> list[list[Change]]:
    """Return the changes that save memory and are not on yet, by kind; of equal flags the strongest
    comes last.
    """
    kinds = (
        _ppo_kinds(config, world_size=world_size)
        if isinstance(config, PPOConfig)
        else _supervised_kinds(config)
    )
    kinds.append([Change({"dtype": "auto"}, 1)] if config.model.dtype == "fp32" else [])
    now = {key: value for group in vars(config).values() for key, value in vars(group).items()}
    found = []
    for kind in kinds:
        new = [
            Change(
                {k: v for k, v in change.options.items() if k in now and now[k] != v}, change.cost
            )
            for change in kind
        ]
        found.append([change for change in new if change.options])
    return [kind for kind in found if kind]


def _supervised_kinds(config) -> list[list[Change]]:
    batch, system = config.batch, config.system
    steps = config.schedule.gradient_accumulation_steps
    return [
        [Change({"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 4)}, 0)],
        [Change({"gradient_checkpointing": True}, 1)],
        _fewer_rows(
            "per_device_train_batch_size",
            batch.per_device_train_batch_size,
            "gradient_accumulation_steps",
            steps,
        ),
        _stages("zero_stage", system.zero_stage),
        [
            Change({"share_reference": True}, 1),
            Change({"offload_reference_model": True}, 2),
        ],  # of DPO
        [
            Change({"lora_dim": config.lora.lora_dim or LORA_DIM}, 2),
            Change({"only_optimize_lora": True}, 3),
        ],
        [Change({"enable_mixed_precision_lora": True}, 3)],
        [Change({"offload": True}, 4), Change({"pin_memory": False}, 1)],
    ]


def _ppo_kinds(config: PPOConfig, *, world_size: int) -> list[list[Change]]:
    batch, system, lora = config.batch, config.system, config.lora
    training, generation = (
        batch.per_device_training_batch_size,
        batch.per_device_generation_batch_size,
    )
    steps, batches = config.schedule.gradient_accumulation_steps, batch.generation_batches
    return [
        [Change({"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 4)}, 0)],
        [
            Change({"actor_gradient_checkpointing": True}, 1),
            Change({"critic_gradient_checkpointing": True}, 1),
        ],
        _fewer_rows(
            "per_device_training_batch_size", training, "gradient_accumulation_steps", steps
        ),
        _fewer_rows("per_device_generation_batch_size", generation, "generation_batches", batches),
        _replica_changes(config, world_size=world_size),
        [Change({"offload_idle_states": True}, 2)],
        [
            *_stages("actor_zero_stage", system.actor_zero_stage),
            *_stages("critic_zero_stage", system.critic_zero_stage),
        ],
        [Change({"share_reference": True}, 1), Change({"share_reward": True}, 1)],
        [Change({"offload_reference_model": True}, 2), Change({"offload_reward_model": True}, 2)],
        [
            Change({"actor_lora_dim": lora.actor_lora_dim or LORA_DIM}, 2),
            Change({"critic_lora_dim": lora.critic_lora_dim or LORA_DIM}, 2),
            Change({"only_optimize_lora": True}, 3),
        ],
        [Change({"enable_mixed_precision_lora": True}, 3)],
        [Change({"offload": True}, 4), Change({"pin_memory": False}, 1)],
    ]


def _replica_changes(config: PPOConfig, *, world_size: int) -> list[Change]:
    """Return the changes of the Hybrid Engine, with the sizes of tensor-parallel groups that actor
    and ranks allow.
    """
    if not config.system.enable_hybrid_engine:
        return []
    model = config.model
    actor = find_config(
        model.actor_model_name_or_path,
        flag="--actor_model_name_or_path",
        trust_remote_code=model.trust_remote_code,
    )
    sizes = [size for size in (2, 4, 8) if size > config.system.inference_tp_size]
    return [
        Change({"unpin_actor_parameters": True}, 1),
        Change({"hybrid_lora": "attach"}, 1),
        Change({"release_inference_cache": True}, 2),
        *(
            Change({"inference_tp_size": n}, 2)
            for n in sizes
            if not split_problems(actor, n, world_size=world_size)
        ),
    ]


def _stages(name: str, now: int) -> list[Change]:
    return [Change({name: stage}, 2 if stage == 3 else 1) for stage in range(now + 1, 4)]


def _fewer_rows(name: str, rows: int, times_name: str, times: int) -> list[Change]:
    """Return changes to about half, a quarter and one of `rows`, more times, so that nothing
    changes but memory and speed.
    """
    few = sorted(
        {math.gcd(rows, rows // part) for part in (2, 4, rows) if rows >= part > 1}, reverse=True
    )
    return [
        Change({name: less, times_name: times * rows // less}, cost)
        for cost, less in enumerate(few, start=1)
    ]
