"""Advice on the flags that make a run fit.

Every set of a few flags is planned, and the smallest and mildest that fits is taken. If no small
set fits, whole kinds of changes are planned together, and what is not needed is removed again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dschat.config.ppo import PPOConfig
from dschat.config.sft import SFTConfig
from dschat.generation.tensor_parallel import split_problems
from dschat.memory.model_size import find_config
from dschat.memory.plan import StepPlan, plan_step

GIB = 2**30
# In addition to tensors: the CUDA context, the libraries' workspaces, communication buffers.
OVERHEAD = 0.75 * GIB
PLANNED_FLAGS = 4  # every set of at most so many flags is planned, which takes about a second
MOST_GPUS = 1024
GPUS_OF_A_HOST = 8
LORA_DIM = 64


@dataclass(frozen=True)
class Change:
    """Options that only make sense together.

    Attributes:
        options: values by the names of their flags.
        cost: loss of speed or quality, from 0 (next to none) to 5 (large).
        keeps_results: the objective, and the rows of each update and evaluation, stay the same.
    """

    options: dict
    cost: int
    keeps_results: bool = True


@dataclass(frozen=True)
class Machine:
    """The resources that a run may use."""

    world_size: int  # ranks, one GPU each
    processes: int  # ranks of one host
    gpu_bytes: float  # memory of a GPU; 0 if it is not known
    all_host_bytes: float  # memory of a host; 0 if it is not known

    def missing(self, plan: StepPlan) -> float:
        """Return the bytes that `plan` lacks on a GPU and on a host, added up; 0 if it fits."""
        gpu = 0.0
        if self.gpu_bytes:
            gpu = max(needed_bytes(plan) - self.gpu_bytes, 0.0)
        host = 0.0
        if self.all_host_bytes:
            host = max(plan.host_bytes(processes=self.processes) - self.all_host_bytes, 0.0)
        return gpu + host


@dataclass(frozen=True)
class Remedy:
    """Options, the plan with them, and the bytes that this plan lacks."""

    options: dict
    plan: StepPlan
    missing: float

    @property
    def flags(self) -> list[str]:
        """The flags with their values, as on a command line."""
        found = []
        for key, value in self.options.items():
            if not isinstance(value, bool):
                found.append(f"--{key} {value}")
            elif value:
                found.append(f"--{key}")
            else:
                found.append(f"--no_{key}")
        return found


def needed_bytes(plan: StepPlan) -> float:
    """Return the bytes that a GPU must have."""
    return plan.peak[1] + OVERHEAD


def find_remedy(config, machine: Machine, *, dtype: str, same_results: bool = False) -> Remedy:
    """Find the fewest flags with which `config` fits, and the mildest of equally few.

    If there are at most PLANNED_FLAGS, no smaller set of changes fits. If there are more, none of
    them can be left out.

    Args:
        config: of any step.
        machine: that it has to fit.
        dtype: "fp16", "bf16" or "fp32".
        same_results: take only changes that keep the run's results, and find the mildest, not the
            fewest.

    Returns:
        The remedy; if nothing fits, the one that lacks the fewest bytes.

    Raises:
        ValueError: the model is not known.
    """
    kinds = _kinds(config, world_size=machine.world_size)
    if same_results:
        kinds = [[change for change in kind if change.keeps_results] for kind in kinds]
        kinds = [kind for kind in kinds if kind]
    planned = functools.partial(_planned, config, machine=machine, dtype=dtype)
    nearest = planned({})
    for options in _small_sets(kinds, mildest=same_results):
        found = planned(options)
        if found and not found.missing:
            return found
        nearest = _nearer(nearest, found)
    for options in _large_sets(kinds, mildest=same_results):
        nearest = _nearer(nearest, planned(options))
        if not nearest.missing:
            break
    nearest = _with_single_changes(nearest, kinds, planned)
    return _without_needless(nearest, kinds, planned)


def _with_single_changes(found: Remedy, kinds: list[list[Change]], planned: Callable) -> Remedy:
    """Return `found` with further changes, one at a time, until none of them saves more bytes."""
    changes = [change for kind in kinds for change in kind]
    while found.missing:
        nearest = found
        for change in changes:
            nearest = _nearer(nearest, planned(found.options | change.options))
        if nearest is found:
            break
        found = nearest
    return found


def enough_gpus(config, machine: Machine, *, dtype: str) -> tuple[Machine, Remedy] | None:
    """Find the smallest number of GPUs that is enough: twice as many, four times as many, ...

    Returns:
        The larger machine and the flags with which `config` fits it, or None if MOST_GPUS are not
        enough.
    """
    world_size = 2 * machine.world_size
    while world_size <= MOST_GPUS:
        processes = min(world_size, max(machine.processes, GPUS_OF_A_HOST))
        larger = replace(machine, world_size=world_size, processes=processes)
        planned = functools.partial(_planned, config, machine=larger, dtype=dtype)
        kinds = _kinds(config, world_size=world_size)
        for options in _large_sets(kinds):
            found = planned(options)
            if found and not found.missing:
                return larger, _without_needless(found, kinds, planned)
        world_size *= 2
    return None


def with_options(config, options: dict):
    """Return `config` with fields of its groups replaced.

    Args:
        config: of any step.
        options: values by the names of their flags.
    """
    groups = {}
    for name, group in vars(config).items():
        mine = {key: value for key, value in options.items() if hasattr(group, key)}
        groups[name] = replace(group, **mine) if mine else group
    return type(config)(**groups)


def _planned(config, options: dict, *, machine: Machine, dtype: str) -> Remedy | None:
    """Return the remedy of these options, or None if they exclude each other."""
    changed = with_options(config, options)
    if changed.problems():
        return None
    plan = plan_step(
        changed, world_size=machine.world_size, dtype="bf16" if "dtype" in options else dtype
    )
    return Remedy(options, plan, machine.missing(plan))


def _nearer(one: Remedy | None, other: Remedy | None) -> Remedy | None:
    """Return the remedy that lacks fewer bytes; if they are equal, the first."""
    if other is None:
        return one
    if one is None or other.missing < one.missing:
        return other
    return one


def _small_sets(kinds: list[list[Change]], *, mildest: bool = False) -> list[dict]:
    """Return all sets of changes with at most PLANNED_FLAGS flags, as ``_in_order`` sorts them."""
    changes = [change for kind in kinds for change in kind]
    sets = (
        chosen
        for count in range(1, PLANNED_FLAGS + 1)
        for chosen in itertools.combinations(changes, count)
    )
    in_order = _in_order(sets, mildest=mildest)
    return [options for options in in_order if len(options) <= PLANNED_FLAGS]


def _large_sets(kinds: list[list[Change]], *, mildest: bool = False) -> list[dict]:
    """Return all sets of whole kinds, each at its strongest, as ``_in_order`` sorts them."""
    strongest = [_strongest(kind) for kind in kinds]
    sets = (
        chosen
        for count in range(1, len(kinds) + 1)
        for chosen in itertools.combinations(strongest, count)
    )
    return _in_order((itertools.chain(*chosen) for chosen in sets), mildest=mildest)


def _in_order(sets: Iterable[Iterable[Change]], *, mildest: bool = False) -> list[dict]:
    """Return the options of each set: those of the fewest flags first, of equally few the mildest.

    With `mildest` the mildest are first, and of equally mild ones the fewest. Sets that give a flag
    two values are left out.
    """
    found = []
    for chosen in sets:
        options: dict = {}
        count = 0
        cost = 0
        for change in chosen:
            options |= change.options
            count += len(change.options)
            cost += change.cost
        if len(options) == count:
            found.append((cost, count, options) if mildest else (count, cost, options))
    return [options for _, _, options in sorted(found, key=lambda item: item[:2])]


def _strongest(kind: list[Change]) -> list[Change]:
    """Return the last of the changes of each flag, which is the strongest."""
    return list({tuple(change.options): change for change in kind}.values())


def _without_needless(found: Remedy, kinds: list[list[Change]], planned: Callable) -> Remedy:
    """Return `found` without the changes that it does not need.

    The most expensive change is tried first. A change is removed, or replaced by a milder one, if
    not more bytes are missing then.
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
    """Return the changes that save memory and are not made yet, by kind.

    Of the changes of a flag the strongest comes last.
    """
    if isinstance(config, PPOConfig):
        kinds = _ppo_kinds(config, world_size=world_size)
    else:
        kinds = _supervised_kinds(config)
    if config.model.dtype == "fp32":
        kinds.append([Change({"dtype": "auto"}, 1, keeps_results=False)])
    now = {key: value for group in vars(config).values() for key, value in vars(group).items()}
    found = []
    for kind in kinds:
        changes = []
        for change in kind:
            options = {k: v for k, v in change.options.items() if k in now and now[k] != v}
            if options:
                changes.append(replace(change, options=options))
        if changes:
            found.append(changes)
    return found


def _supervised_kinds(config) -> list[list[Change]]:
    batch = config.batch
    one_row = config.data.max_seq_len * (1 if isinstance(config, SFTConfig) else 2)
    system = config.system
    steps = config.schedule.gradient_accumulation_steps
    fewer_eval = {"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 4)}
    # --eval_iters counts batches of evaluation.
    is_same = not hasattr(config.run, "eval_iters")
    return [
        [Change(fewer_eval, 0, keeps_results=is_same)],
        [Change({"gradient_checkpointing": True}, 1)],
        _fewer_rows(
            "per_device_train_batch_size",
            batch.per_device_train_batch_size,
            "gradient_accumulation_steps",
            steps,
        ),
        [Change({"tokens_per_batch": one_row}, 1)] if batch.tokens_per_batch else [],
        _stages("zero_stage", system.zero_stage),
        # DPO's reference model.
        [
            Change({"share_reference": True}, 1),
            Change({"offload_reference_model": True}, 2),
        ],
        [
            Change({"lora_dim": config.lora.lora_dim or LORA_DIM}, 2, keeps_results=False),
            Change({"only_optimize_lora": True}, 3, keeps_results=False),
        ],
        _rounded_changes(),
        [Change({"offload": True}, 4), Change({"pin_memory": False}, 1)],
    ]


def _ppo_kinds(config: PPOConfig, *, world_size: int) -> list[list[Change]]:
    batch = config.batch
    system = config.system
    lora = config.lora
    training = batch.per_device_training_batch_size
    generation = batch.per_device_generation_batch_size
    steps = config.schedule.gradient_accumulation_steps
    batches = batch.generation_batches
    one_row = config.data.max_prompt_seq_len + config.data.max_answer_seq_len
    return [
        [Change({"per_device_eval_batch_size": min(batch.per_device_eval_batch_size, 4)}, 0)],
        [
            Change({"actor_gradient_checkpointing": True}, 1),
            Change({"critic_gradient_checkpointing": True}, 1),
        ],
        _fewer_rows(
            "per_device_training_batch_size", training, "gradient_accumulation_steps", steps
        ),
        [Change({"training_tokens_per_batch": one_row}, 1)]
        if batch.training_tokens_per_batch
        else [],
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
            Change({"actor_lora_dim": lora.actor_lora_dim or LORA_DIM}, 2, keeps_results=False),
            Change({"critic_lora_dim": lora.critic_lora_dim or LORA_DIM}, 2, keeps_results=False),
            Change({"only_optimize_lora": True}, 3, keeps_results=False),
        ],
        _rounded_changes(),
        [Change({"offload": True}, 4), Change({"pin_memory": False}, 1)],
    ]


def _replica_changes(config: PPOConfig, *, world_size: int) -> list[Change]:
    """Return the changes of the Hybrid Engine.

    They include the sizes of tensor-parallel groups that the actor and the ranks allow.
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


def _rounded_changes() -> list[Change]:
    """Return the changes that keep frozen weights in fewer bits."""
    return [
        Change({"quantize_frozen": "int8"}, 3, keeps_results=False),
        Change({"quantize_frozen": "nf4"}, 4, keeps_results=False),
    ]


def _stages(name: str, now: int) -> list[Change]:
    return [Change({name: stage}, 2 if stage == 3 else 1) for stage in range(now + 1, 4)]


def _fewer_rows(name: str, rows: int, times_name: str, times: int) -> list[Change]:
    """Return the changes to smaller batches: about half, about a quarter, and one row.

    The number of batches grows accordingly, so that only memory and speed change.
    """
    smaller = {math.gcd(rows, rows // part) for part in (2, 4, rows) if rows >= part > 1}
    return [
        Change({name: fewer, times_name: times * rows // fewer}, cost)
        for cost, fewer in enumerate(sorted(smaller, reverse=True), start=1)
    ]
