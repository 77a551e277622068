"""The world of a run: ranks and world size from the environment of torchrun, accelerate, SLURM or Open MPI.

Imports no torch at module level.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.runtime.slurm_env import gpus_on_node, read_step


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run, seen from one of them. Named as by torchrun; `node` is its GROUP_RANK."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: int = 0
    device: str = "cpu"
    launcher: str = "python"
    why: str = "no launcher in the environment: one process"
    """how the launcher was recognized, for the banner"""
    store: Any = field(default=None, repr=False, compare=False)
    """the `torch.distributed.Store` of all ranks, after the rendezvous"""


def find_world(environment: Mapping[str, str], launcher: str = "auto") -> World:
    """The world that the environment describes, in the way of `launcher` if it could be read in several.

    `environment` is whoever sets RANK and WORLD_SIZE, `python` nobody: one process. Raises ValueError for a
    world that cannot be.
    """
    numbers = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    detected = {
        world.launcher: world
        for world in (detect(environment, numbers) for detect in DETECTORS)
        if world is not None
    }
    if launcher == "auto":
        world = next(iter(detected.values()), World())
    elif launcher == "python":
        world = World(why="launcher=python: one process, whatever the environment says")
    elif launcher in detected:
        world = detected[launcher]
    else:
        raise ValueError(
            f"launcher={launcher}, but the environment is that of {' and '.join(detected) or 'none'}: "
            "start it that way, or leave the key out"
        )
    refuse_contradictions(world, environment)
    return world


def from_torchrun(environment: Mapping[str, str], numbers: Mapping[str, int]) -> World | None:
    """A rank of torchrun, accelerate, or anything else that sets their variables."""
    if "RANK" not in numbers or "WORLD_SIZE" not in numbers:
        return None
    elastic, accelerate = "TORCHELASTIC_RUN_ID" in environment, "ACCELERATE_MIXED_PRECISION" in environment
    return World(
        rank=numbers["RANK"],
        local_rank=numbers.get("LOCAL_RANK", 0),
        world_size=numbers["WORLD_SIZE"],
        local_world_size=numbers.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"]),
        node=numbers.get("GROUP_RANK", 0),
        launcher="accelerate" if accelerate else "torchrun" if elastic else "environment",
        why="RANK and WORLD_SIZE are set",
    )


def from_srun(environment: Mapping[str, str], numbers: Mapping[str, int]) -> World | None:  # noqa: ARG001
    """A task of an srun step."""
    step = read_step(environment)
    if step is None:
        return None
    return World(
        rank=step.rank,
        local_rank=step.local_rank,
        world_size=step.num_tasks,
        local_world_size=step.tasks_on_node,
        node=step.node,
        launcher="srun",
        why="SLURM_PROCID and SLURM_STEP_NUM_TASKS are set",
    )


def from_mpirun(environment: Mapping[str, str], numbers: Mapping[str, int]) -> World | None:  # noqa: ARG001
    """A process of Open MPI's mpirun, which starts ranks for us; its messages are not used."""
    if "OMPI_COMM_WORLD_RANK" not in numbers or "OMPI_COMM_WORLD_SIZE" not in numbers:
        return None
    local = numbers.get("OMPI_COMM_WORLD_LOCAL_SIZE", numbers["OMPI_COMM_WORLD_SIZE"])
    return World(
        rank=numbers["OMPI_COMM_WORLD_RANK"],
        local_rank=numbers.get("OMPI_COMM_WORLD_LOCAL_RANK", 0),
        world_size=numbers["OMPI_COMM_WORLD_SIZE"],
        local_world_size=local,
        node=numbers.get("OMPI_COMM_WORLD_NODE_RANK", numbers["OMPI_COMM_WORLD_RANK"] // local),
        launcher="mpirun",
        why="OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are set",
    )


DETECTORS = (from_torchrun, from_srun, from_mpirun)
"""in this order: torchrun may have been started by srun, and not the other way round"""


def refuse_contradictions(world: World, environment: Mapping[str, str]) -> None:
    """Raise ValueError for a world that cannot be, with the command that would be right."""
    if (
        not 0 <= world.rank < world.world_size
        or not 0 <= world.local_rank < world.local_world_size <= world.world_size
    ):
        raise ValueError(
            f"{world.launcher} says rank {world.rank} of {world.world_size}, local rank {world.local_rank} "
            "of "
            f"{world.local_world_size}: that cannot be ({world.why})"
        )
    step = read_step(environment)
    if step is None or world.launcher not in ("torchrun", "accelerate", "environment"):
        return
    if step.tasks_on_node > 1:
        raise ValueError(
            f"srun started {step.tasks_on_node} tasks on this node, and each of them {world.launcher} with "
            f"{world.local_world_size} rank(s): srun --ntasks-per-node=1 {world.launcher} ..., or srun "
            "python "
            f"launch/run.py ... without {world.launcher}"
        )
    if step.num_nodes > 1 and world.world_size == world.local_world_size:
        raise ValueError(
            f"srun started {world.launcher} on {step.num_nodes} nodes, but each trains by itself "
            f'({world.world_size} rank(s)): torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" '
            "--master_addr=HOST ..., or slurm/train.sbatch"
        )


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of an srun step: its first host, and a port of its own."""
    step = read_step(environment)
    assert step is not None
    return {"MASTER_ADDR": step.hosts[0], "MASTER_PORT": str(step.master_port)}


def mpi_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of ranks that mpirun started on one host. Raises ValueError if it was on
    several.
    """
    if (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != environment["OMPI_COMM_WORLD_SIZE"]
        and "MASTER_ADDR" not in environment
    ):
        raise ValueError(
            "mpirun on several hosts does not tell where rank zero is: "
            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        )
    job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(10000 + zlib.crc32(job.encode()) % 20000)}


def find_device(world: World) -> str:
    """`cuda:LOCAL_RANK` where there are GPUs, else `cpu`. Raises ValueError if some ranks of the node would
    have none.
    """
    import torch

    if not torch.cuda.is_available():
        if given := gpus_on_node(os.environ):
            built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
            raise ValueError(
                f"SLURM gave this node {given} GPU(s), and torch sees none: torch {torch.__version__} was "
                f"built {built}; look at nvidia-smi and `rankzero doctor`, or ask for no GPU to train on the "
                "CPU"
            )
        return "cpu"
    if torch.cuda.device_count() == 1 and world.local_rank > 0 and world.launcher == "srun":
        return "cuda:0"  # --gpus-per-task shows each task its own GPU
    if world.local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{world.local_world_size} ranks on a node with {torch.cuda.device_count()} GPU(s); start at "
            "most one "
            "rank per GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return f"cuda:{world.local_rank}"
