"""Read this process's rank from the environment of a launcher or of SLURM, if there is one."""

import re
from collections.abc import Mapping
from pathlib import Path

from dschat.runtime.ports import free_port

SLURM_PORTS = range(20000, 40000)


def process_variables(environment: Mapping[str, str], *, local_rank: int = -1) -> dict[str, str]:
    """Return the variables of torch.distributed that `environment` lacks.

    - ``deepspeed`` and ``torchrun`` set all of them; an old launcher may give the local rank only
      as a flag.
    - Under ``srun`` with several tasks they follow from SLURM's variables.
    - Otherwise the process is a group of one, on a free port.

    Args:
        environment: the variables that are set.
        local_rank: the flag of old launchers; -1 if it is not given.

    Raises:
        ValueError: the environment has RANK without the others.
    """
    if "RANK" in environment:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ValueError(
                    f"RANK is set and {name} is not: set it as torchrun does, or unset RANK to run "
                    "a single process."
                )
        found = {"LOCAL_RANK": str(max(local_rank, 0))}
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        found = _slurm_variables(environment)
    else:
        found = dict(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    return {name: value for name, value in found.items() if name not in environment}


def shared_buffers(environment: Mapping[str, str], *, rank: int) -> list[Path]:
    """Return the files that DeepSpeed (0.19) made for a rank's reductions within its host.

    The list is empty if it made none.
    """
    place = f"{environment['MASTER_ADDR']}_{environment['MASTER_PORT']}_{rank}"
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{place}"))


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch.distributed for a task of ``srun``."""
    # Every task must compute the same port, without asking another.
    job = int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    # A task that sees only one GPU knows it as the first.
    sees_one_gpu = (
        environment.get("SLURM_GPUS_PER_TASK") == "1"
        or environment.get("SLURM_STEP_GPUS", "-").isdigit()
    )
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # "8", or "8(x2),4"
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if sees_one_gpu else environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": re.match(r"\d+", tasks_per_node).group(),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(SLURM_PORTS[job % len(SLURM_PORTS)]),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: "gpu[03-05,9],login" -> "gpu03"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at the first comma outside brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
