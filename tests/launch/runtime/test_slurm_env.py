"""What SLURM's environment variables say."""

from __future__ import annotations

import pytest

from launch.runtime.slurm_env import (
    expand_counts,
    expand_hosts,
    gpus_on_node,
    job_end_time,
    read_step,
    step_hosts,
)


@pytest.mark.parametrize(
    ("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("3,2", [3, 2]), ("1(x2),8(x2)", [1, 1, 8, 8])]
)
def test_tasks_of_uneven_nodes(text: str, tasks: list[int]) -> None:
    assert expand_counts(text) == tasks


def test_lists_of_hosts() -> None:
    assert step_hosts({"SLURM_STEP_NODELIST": "n[1-2,07],m1,k[098-100]-ib"}) == [
        *("n1", "n2", "n07", "m1", "k098-ib", "k099-ib", "k100-ib")
    ]
    assert step_hosts({}) == []
    assert expand_hosts("rack[2-3]node[10-11]") == [
        *("rack2node10", "rack2node11", "rack3node10", "rack3node11")
    ]


def test_a_batch_script_is_no_task_of_a_step() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42"}
    assert read_step(batch) is None
    step = read_step(
        {
            **batch,
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "3,2",
            "SLURM_NODEID": "1",
            "SLURM_STEP_NODELIST": "n[1-2]",
        }
    )
    assert step is not None
    assert (step.tasks_on_node, step.hosts, step.job_id) == (2, ("n1", "n2"), 42)


def test_the_end_of_the_job_and_its_gpus() -> None:
    assert (job_end_time({}), job_end_time({"SLURM_JOB_END_TIME": "NOT_SET"})) == (None, None)
    assert job_end_time({"SLURM_JOB_END_TIME": "1900000000"}) == 1_900_000_000
    assert (gpus_on_node({}), gpus_on_node({"SLURM_GPUS_ON_NODE": "8"})) == (0, 8)
