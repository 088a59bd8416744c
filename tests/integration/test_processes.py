"""Ranks find each other under torchrun and srun; all other tests use the deepspeed launcher."""

import os
import subprocess
import sys

import pytest
from launches import environment

SCRIPT = """
import os
from pathlib import Path
import torch
from dschat.engine.build import start_processes
from dschat.engine.launch_env import shared_buffers
from dschat.runtime import dist

start_processes()
total = dist.all_reduce(torch.tensor(dist.rank() + 1))
print(f"rank {dist.rank()} of {dist.world_size()}, sum {int(total)}", flush=True)
mapped = Path("/proc/self/maps").read_text().count("/deepspeed_allreduce_buffer_")
print(f"mapped {mapped} left {len(shared_buffers(os.environ, rank=dist.rank()))}", flush=True)
"""
RANKS = 2


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, list[str]]:
    """Return the output of the ranks, by launcher; all run at once, since most time is spent
    importing.
    """
    script = tmp_path_factory.mktemp("processes") / "script.py"
    script.write_text(SCRIPT)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    outside = environment()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(RANKS),
    ]
    running = {"torchrun": [subprocess.Popen([*torchrun, str(script)], env=outside, **options)]}
    running["srun"] = [
        subprocess.Popen([sys.executable, str(script)], env={**outside, **_slurm(rank)}, **options)
        for rank in range(RANKS)
    ]
    running["python"] = [subprocess.Popen([sys.executable, str(script)], env=outside, **options)]
    return {
        name: [process.communicate(timeout=120)[0] for process in group]
        for name, group in running.items()
    }


def _slurm(rank: int) -> dict[str, str]:
    """Return the variables of one of two tasks on this machine; the port follows from the job's
    number.
    """
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(RANKS),
        "SLURM_STEP_TASKS_PER_NODE": str(RANKS),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        # The deepspeed launcher sets it; DeepSpeed then creates its shared memory.
        "LOCAL_SIZE": str(RANKS),
    }


@pytest.mark.parametrize("name, ranks", [("torchrun", RANKS), ("srun", RANKS), ("python", 1)])
def test_processes_find_each_other(name, ranks, printed):
    said = "\n".join(printed[name])
    for rank in range(ranks):
        assert f"rank {rank} of {ranks}, sum {ranks * (ranks + 1) // 2}" in said, said[-3000:]


def test_shared_memory_does_not_outlive_its_processes(printed):
    """DeepSpeed creates a file of 66 MiB per process of a host and removes none; each maps all of
    them.
    """
    for said in printed["srun"]:
        assert f"mapped {RANKS} left 0" in said, said[-3000:]
