"""What SLURM's environment variables say of a step and of its job. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT, PORTS = 10000, 20000
"""ports of jobs: below those that the kernel gives to outgoing connections (from 32768 on)"""


@dataclass(frozen=True, kw_only=True)
class SlurmStep:
    """A step of a job (what one srun starts), seen from one of its tasks."""

    rank: int
    local_rank: int
    num_tasks: int
    tasks_on_node: int
    """of the node that this task is on"""
    node: int
    num_nodes: int
    hosts: tuple[str, ...]
    """the nodes by name, in the order of their ranks"""
    job_id: int
    step_id: int

    @property
    def master_port(self) -> int:
        """A port that follows from job and step: two jobs may share a node."""
        return FIRST_PORT + (self.job_id * 13 + self.step_id) % PORTS


def read_step(environment: Mapping[str, str]) -> SlurmStep | None:
    """The step that this process is a task of; None outside one.

    A batch script outside srun has SLURM_PROCID too: only a step has a task count of its own.
    """
    number = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    if "SLURM_PROCID" not in number or "SLURM_STEP_NUM_TASKS" not in number:
        return None
    node = number.get("SLURM_NODEID", 0)
    tasks = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return SlurmStep(
        rank=number["SLURM_PROCID"],
        local_rank=number.get("SLURM_LOCALID", 0),
        num_tasks=number["SLURM_STEP_NUM_TASKS"],
        tasks_on_node=tasks[min(node, len(tasks) - 1)],
        node=node,
        num_nodes=number.get("SLURM_STEP_NUM_NODES", 1),
        hosts=tuple(expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))),
        job_id=number.get("SLURM_JOB_ID", 0),
        step_id=number.get("SLURM_STEP_ID", 0),
    )


def step_hosts(environment: Mapping[str, str]) -> list[str]:
    """The nodes of a step by name; none outside SLURM."""
    return expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))


def job_end_time(environment: Mapping[str, str]) -> float | None:
    """When SLURM will end the job, in seconds since the epoch; None without a time limit."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() else None


def gpus_on_node(environment: Mapping[str, str]) -> int:
    """GPUs that SLURM gave the job on this node; 0 outside SLURM."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdecimal() else 0


def expand_counts(tasks_per_node: str) -> list[int]:
    """The tasks of each node: `2(x3),1` is two on each of three nodes, one on the last."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def expand_hosts(nodelist: str) -> list[str]:
    """The names in a list of nodes: `n[1-2,07],m1` as n1, n2, n07, m1."""
    items: list[str] = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return [host for item in items for host in expand_brackets(item)]


def expand_brackets(item: str) -> list[str]:
    """The names that an item of a node list stands for; `rack[2-3]node[10-11]` has four."""
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{tail}" for number in numbers for tail in expand_brackets(after)]
