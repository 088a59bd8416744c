"""The memory plan as text, whether it fits, and what would make it fit."""

from dschat.memory.activations import MEASURED
from dschat.memory.advice import (
    GIB,
    MOST_GPUS,
    OVERHEAD,
    Machine,
    Remedy,
    enough_gpus,
    find_remedy,
    needed_bytes,
)
from dschat.memory.phases import KINDS
from dschat.memory.plan import StepPlan
from dschat.tracking.table import table

FEW_FLAGS = 3  # with more flags, the advice says that so many are not enough


def plan_text(
    plan: StepPlan, *, processes: int, gpu_bytes: float = 0.0, all_host_bytes: float = 0.0
) -> str:
    """Return the plan as two tables and a verdict.

    The first table has a row for each model, the second a row for each phase, with everything that
    is in memory at its worst moment.

    Args:
        plan: of a step.
        processes: ranks of one host.
        gpu_bytes: memory of a GPU; 0 if it is not known.
        all_host_bytes: memory of the host; 0 if it is not known.
    """
    phase, peak = plan.peak
    with_overhead = f"with {_gib(OVERHEAD)} GiB for CUDA and libraries it needs"
    verdict = f"{with_overhead} {_gib(needed_bytes(plan))} GiB on a GPU"
    if gpu_bytes:
        fits = "fits" if needed_bytes(plan) <= gpu_bytes else "does not fit"
        verdict += f" of {_gib(gpu_bytes)} GiB: {fits}"
    host = plan.host_bytes(processes=processes)
    verdict += f"\n{_gib(host)} GiB of host memory for {processes} process(es)"
    if all_host_bytes:
        fits = "fits" if host <= all_host_bytes else "does not fit"
        verdict += f" of {_gib(all_host_bytes)} GiB: {fits}"
    return "\n".join(
        [
            _models_table(plan),
            "",
            _phases_table(plan, processes=processes),
            *sureness_lines(plan),
            f"peak {_gib(peak)} GiB ({phase})",
            verdict,
        ]
    )


def sureness_lines(plan: StepPlan) -> list[str]:
    """Return a line for each model whose memory is less certain than a measured family's."""
    lines = []
    for name, size in plan.sizes.items():
        estimates = []
        if size.family not in MEASURED:
            estimates.append(
                "activations are counted as those of Llama's layers (an estimate: this family was "
                "not measured)"
            )
        if not size.cache.counted:
            estimates.append(
                "the KV cache is an upper bound from the widths of attention (the model does not "
                "run without weights)"
            )
        if estimates:
            lines.append(f"{name} ({size.family}): parameters are exact; {'; '.join(estimates)}")
    return lines


def _models_table(plan: StepPlan) -> str:
    columns = ("weights", "master", "adam", "average", "gradients", "buffers", "host")
    rows = [
        [
            name,
            f"{plan.sizes[name].parameters / 1e6:,.0f}",
            f"{plan.sizes[name].trained / 1e6:,.0f}",
        ]
        + [_gib(getattr(model, column)) for column in columns]
        for name, model in plan.models.items()
    ]
    header = [
        "GiB a process",
        "M param.",
        "trained",
        "weights",
        "fp32",
        "Adam",
        "EMA",
        "gradients",
        "buffers",
        "host",
    ]
    return table(rows, header=header)


def _phases_table(plan: StepPlan, *, processes: int) -> str:
    """Return a table with a row for each phase on one GPU, and one row for a host.

    Kinds of tensors that no phase has get no column.
    """
    every = {**plan.parts, f"a host of {processes}": plan.host_parts(processes=processes)}
    kinds = [kind for kind in KINDS if any(parts.get(kind) for parts in every.values())]
    rows = [
        [name, *(_gib(parts.get(kind, 0.0)) for kind in kinds), _gib(sum(parts.values()))]
        for name, parts in every.items()
    ]
    return table(rows, header=["GiB a GPU", *kinds, "all"])


def check_fit(
    config,
    plan: StepPlan,
    *,
    world_size: int,
    processes: int,
    dtype: str,
    gpu_bytes: float,
    all_host_bytes: float,
) -> None:
    """Check that the plan fits.

    Raises:
        ValueError: it does not. The message names the flags that would make it fit.
    """
    machine = Machine(world_size, processes, gpu_bytes, all_host_bytes)
    if not machine.missing(plan):
        return
    phase, _ = plan.peak
    needs = f"{_gib(needed_bytes(plan))} GiB on each GPU ({phase})"
    needs += f" of {_gib(gpu_bytes)} GiB" if gpu_bytes else ""
    if all_host_bytes:
        host = _gib(plan.host_bytes(processes=processes))
        needs += f", and {host} GiB of {_gib(all_host_bytes)} GiB host memory"
    raise ValueError(
        f"This run does not fit: it needs {needs}. {_advice(config, machine, dtype=dtype)} "
        "--ignore_memory_plan starts it all the same."
    )


def _advice(config, machine: Machine, *, dtype: str) -> str:
    """Return sentences that say what to change."""
    found = find_remedy(config, machine, dtype=dtype)
    if not found.missing:
        text = f"It fits with {with_sizes(found, machine)}."
        if len(found.options) > FEW_FLAGS:
            text = f"No {FEW_FLAGS} flags are enough. {text}"
        return text
    text = f"No flags make it fit {machine.world_size} GPU(s)"
    if found.options:
        text += f": with {with_sizes(found, machine)} it is nearest, and "
        text += f"{_gib(found.missing)} GiB too large"
    more = enough_gpus(config, machine, dtype=dtype)
    if more is None:
        hosts = ", or hosts with more memory" if machine.all_host_bytes else ""
        return f"{text}. Up to {MOST_GPUS} GPUs are not enough either: take a smaller model{hosts}."
    larger, fitting = more
    return f"{text}. {larger.world_size} GPUs would do, with {with_sizes(fitting, larger)}."


def with_sizes(found: Remedy, machine: Machine) -> str:
    """Return the flags of a remedy with what the run then needs."""
    host = found.plan.host_bytes(processes=machine.processes)
    gpu = needed_bytes(found.plan)
    sizes = f"{_gib(gpu)} GiB on each GPU, {_gib(host)} GiB of host memory"
    return f"{' '.join(found.flags)} ({sizes})"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.095 * GIB or size == 0 else f"{size / GIB:.3f}"
