"""Who takes part in a run: found in the environment of torchrun, accelerate, SLURM, or alone. Imports no torch at first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run, seen from one of them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: int = 0
    device: str = "cpu"
    launcher: str = "python"
    why: str = "no launcher in the environment: one process"


def find_world(environment: Mapping[str, str]) -> World:
    """The world that the launcher describes. Raises ValueError if what it says cannot be."""
    world = _found(environment)
    if not 0 <= world.rank < world.world_size:
        raise ValueError(f"{world.launcher} says rank {world.rank} of {world.world_size}: check {world.why}")
    return world


def _found(environment: Mapping[str, str]) -> World:
    number = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    if "RANK" in number and "WORLD_SIZE" in number:
        elastic, accelerate = "TORCHELASTIC_RUN_ID" in environment, "ACCELERATE_MIXED_PRECISION" in environment
        return World(
            rank=number["RANK"],
            local_rank=number.get("LOCAL_RANK", 0),
            world_size=number["WORLD_SIZE"],
            local_world_size=number.get("LOCAL_WORLD_SIZE", number["WORLD_SIZE"]),
            node=number.get("GROUP_RANK", 0),
            launcher="accelerate" if accelerate else "torchrun" if elastic else "environment",
            why="RANK and WORLD_SIZE are set",
        )
    # a batch script outside srun has SLURM_PROCID and SLURM_NTASKS too: only a step has a task count of its own
    if "SLURM_PROCID" in number and "SLURM_STEP_NUM_TASKS" in number:
        return World(
            rank=number["SLURM_PROCID"],
            local_rank=number.get("SLURM_LOCALID", 0),
            world_size=number["SLURM_STEP_NUM_TASKS"],
            local_world_size=int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
            node=number.get("SLURM_NODEID", 0),
            launcher="srun",
            why="SLURM_PROCID and SLURM_STEP_NUM_TASKS are set",
        )
    return World()


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of an srun step: its first host, and a port that follows from the job and step."""
    hosts = environment["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[(\d+)[^\]]*\].*", r"\1", hosts.split(",")[0] if "[" not in hosts.split(",")[0] else hosts)
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
    return {"MASTER_ADDR": first, "MASTER_PORT": str(20000 + (job * 13 + step) % 20000)}


@contextmanager
def connected(world: World, strategy: str = "ddp") -> Iterator[World]:
    """The world with its device and, unless `strategy` is single, a process group for as long as the context lasts.

    Raises ValueError if a node has fewer GPUs than ranks.
    """
    import torch
    import torch.distributed as dist

    world = replace(world, device=find_device(world))
    cuda = world.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(world.device)
    if strategy == "single":
        yield world
        return
    # FSDP and DeepSpeed want a group even for one rank, which meets itself in memory
    rendezvous: dict[str, Any] = {"init_method": "env://"}
    if world.launcher == "srun":
        os.environ.update({name: value for name, value in slurm_rendezvous(os.environ).items() if name not in os.environ})
    if world.world_size == 1 and "MASTER_ADDR" not in os.environ:
        rendezvous = {"store": dist.HashStore()}  # type: ignore[attr-defined]  # torch exports it, its stubs do not
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(minutes=10),
        device_id=torch.device(world.device) if cuda else None,
        **rendezvous,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def find_device(world: World) -> str:
    """`cuda:LOCAL_RANK` where there are GPUs, else `cpu`. Raises ValueError if some ranks of the node would have none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if torch.cuda.device_count() == 1 and world.local_rank > 0 and world.launcher == "srun":
        return "cuda:0"  # --gpus-per-task shows each task its own GPU
    if world.local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{world.local_world_size} ranks on a node with {torch.cuda.device_count()} GPU(s); start at most one rank per "
            "GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return f"cuda:{world.local_rank}"


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def from_rank_zero(value: Any) -> Any:
    """Rank zero's `value` on every rank; for small things at the start of a run."""
    import torch.distributed as dist

    box = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
