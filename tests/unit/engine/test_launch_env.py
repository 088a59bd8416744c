"""The place of a process among the others, from the environments of launchers and SLURM."""

import pytest

from dschat.engine.launch_env import first_host, process_variables

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_launchers_own_variables_stay():
    complete = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert process_variables({**SRUN, **complete}) == {}
    del complete["LOCAL_RANK"]
    assert process_variables(complete, local_rank=2) == {"LOCAL_RANK": "2"}


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_needs_the_rest(missing):
    given = dict(RANK="3", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")
    del given[missing]
    with pytest.raises(ValueError, match=f"RANK is set and {missing} is not"):
        process_variables(given)


def test_srun():
    assert process_variables(SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(20000 + 4713),
    }
    assert process_variables({**SRUN, "MASTER_PORT": "5000"})["MASTER_ADDR"] == "gpu03"
    assert "MASTER_PORT" not in process_variables({**SRUN, "MASTER_PORT": "5000"})
    assert process_variables({**SRUN, "SLURM_GPUS_PER_TASK": "1"})["LOCAL_RANK"] == "0"


def test_alone_inside_an_allocation_is_a_group_of_one():
    for environment in (
        {},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
    ):
        found = process_variables(environment)
        assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
        assert 1024 <= int(found["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("a-b[1,3]-c,d[4]", "a-b1-c"),
        ("n1,n[2-3]", "n1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host
