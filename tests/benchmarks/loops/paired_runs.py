"""One framework against the raw loop, in turns, in one set of processes: what each rank runs."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import distributed

from tests.benchmarks.benchmark_report import interleave
from tests.benchmarks.loops import Setting, framework
from tests.benchmarks.loops.workloads import WORKLOADS
from tests.ranks import CpuWorld

WARM_UP = 20
"""steps of each run that do not count"""
LOSS_TOLERANCE = 1e-5
"""relative: what losses may differ by"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared."""

    name: str
    strategy: str
    workload: str
    bare: bool
    rounds: int
    steps: int
    port: int
    folder: str


@dataclass(frozen=True)
class Result:
    """The figures of one run."""

    seconds: float
    """a step, from start to start, over all but the first"""
    losses: torch.Tensor
    sharding: str


def compare(world: CpuWorld, comparison: Comparison) -> tuple[list[tuple[float, float]], float, str]:
    """Seconds a step of (raw, framework) by pairs, the largest relative difference of any loss, how its
    model is sharded.
    """
    if comparison.strategy == "single":
        distributed.destroy_process_group()  # some would take it for a reason to reduce gradients
    else:
        set_torchrun_environment(world, comparison.port)
    with redirect_output(Path(comparison.folder) / f"output-{world.rank}"):
        numbers = count()

        def once(name: str) -> Result:
            folder = (
                Path(comparison.folder)
                / f"{comparison.name}-{comparison.workload}-{comparison.bare}-{next(numbers)}"
            )
            setting = Setting(
                strategy=comparison.strategy,
                bare=comparison.bare,
                rank=world.rank,
                ranks=world.world_size,
                folder=folder,
            )
            workload = WORKLOADS[comparison.workload](bare=comparison.bare)
            workload.samples = (comparison.steps + 1) * workload.batch
            gc.collect()
            framework(name)(workload, comparison.steps, setting)
            if distributed.is_initialized():
                distributed.barrier()
            shutil.rmtree(folder, ignore_errors=True)
            return result(workload.stamps, torch.stack(workload.first_losses), workload.sharding)

        pairs = interleave(lambda: once("raw"), lambda: once(comparison.name), comparison.rounds)
    loss_difference = max(((b.losses - a.losses).abs() / a.losses.abs()).max().item() for a, b in pairs)
    return [(a.seconds, b.seconds) for a, b in pairs], loss_difference, pairs[0][1].sharding


def result(stamps: list[float], losses: torch.Tensor, sharding: str) -> Result:
    """From the notes of a workload."""
    return Result((stamps[-1] - stamps[WARM_UP]) / (len(stamps) - 1 - WARM_UP), losses, sharding)


def set_torchrun_environment(world: CpuWorld, port: int) -> None:
    """The environment that torchrun would give a rank."""
    os.environ.update(
        RANK=str(world.rank),
        LOCAL_RANK=str(world.rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world.world_size),
        LOCAL_WORLD_SIZE=str(world.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="benchmark",
    )


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Progress bars and log lines go to a file, whoever writes them."""
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
