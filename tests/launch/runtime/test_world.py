"""Who takes part, from the environment of each launcher; and what cannot be is refused with the line that
mends it.
"""

from __future__ import annotations

from typing import Any

import pytest

from launch.runtime.world import find_world, mpi_rendezvous, slurm_rendezvous

TORCHRUN = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    **{
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NUM_NODES": "2",
    },
    **{
        "SLURM_STEP_TASKS_PER_NODE": "3,2",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "1",
    },
}
MPIRUN = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))
}


def seen(environment: dict[str, str], launcher: str = "auto") -> tuple[Any, ...]:
    world = find_world(environment, launcher)
    return world.launcher, world.rank, world.local_rank, world.world_size, world.local_world_size, world.node


def test_each_launcher_is_understood() -> None:
    assert seen({}) == ("python", 0, 0, 1, 1, 0)
    assert seen(TORCHRUN) == ("torchrun", 5, 1, 8, 4, 1)
    assert seen({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"})[0] == "accelerate"
    assert seen({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == ("environment", 1, 1, 2, 2, 0)
    assert seen(SRUN) == ("srun", 3, 0, 5, 2, 1)
    assert seen(MPIRUN) == ("mpirun", 1, 1, 2, 2, 0)


def test_a_batch_script_is_no_task_of_a_step() -> None:
    assert seen({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42"})[0] == "python"


def test_the_launcher_can_be_chosen() -> None:
    both = {
        **SRUN,
        **TORCHRUN,
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
    }
    assert seen(both)[0] == "torchrun", "what was started inside the other is nearer"
    assert seen(both, "srun")[:2] == ("srun", 1)
    assert seen(both, "python") == ("python", 0, 0, 1, 1, 0)
    with pytest.raises(ValueError, match="launcher=mpirun, but the environment is that of torchrun and srun"):
        seen(both, "mpirun")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8.* that cannot be"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4.* that cannot be"),
        (
            {
                **TORCHRUN,
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
                "SLURM_PROCID": "1",
            },
            r"srun started 2 tasks on this node, and each of them torchrun with 4 rank\(s\): "
            "srun --ntasks-per-node=1 torchrun",
        ),
        (
            {
                **TORCHRUN,
                "WORLD_SIZE": "4",
                "RANK": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_PROCID": "1",
            },
            "on 2 nodes, but each trains by itself",
        ),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_world(environment)


def test_where_ranks_without_torchrun_meet() -> None:
    assert slurm_rendezvous(SRUN)["MASTER_ADDR"] == "gpu07"
    for hosts, first in (
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[01-04,07]-ib,login", "gpu01-ib"),
        ("rack[2-3]node[10-11]", "rack2node10"),
    ):
        assert slurm_rendezvous({**SRUN, "SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first
    other = {**SRUN, "SLURM_JOB_ID": "43"}
    assert slurm_rendezvous(SRUN)["MASTER_PORT"] != slurm_rendezvous(other)["MASTER_PORT"], (
        "two jobs may share a node"
    )
    assert mpi_rendezvous(MPIRUN)["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR=HOST"):
        mpi_rendezvous({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"})
