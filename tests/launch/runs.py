"""Runs inside a test: the loop, the metrics and the checkpoints, without the command around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.checkpoint.writer import CheckpointWriter
from launch.cli.resolve import resolve
from launch.data.sampler import SampleIndices, sample_indices
from launch.reporting.console import Console
from launch.reporting.metrics import Metrics
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import finish, train
from launch.training.stop_and_save import Requests
from launch.watchdog.consensus import PERIOD_S
from launch.watchdog.stop import StopRequest
from tests import ranks
from tests.ranks import run_ranks

StreamSample = tuple[int, int]
"""(epoch, index): one sample of the stream"""


def make_run(cpu_world: ranks.CpuWorld, recipe: str, *args: str) -> Run:
    """The run that the command line describes, of a recipe of `tests.launch.tiny`, on this rank."""
    return run_from_argv(cpu_world, f"recipe=tests.launch.tiny:{recipe}", "workers=0", *args)


def run_from_argv(cpu_world: ranks.CpuWorld, *args: str) -> Run:
    """The run that the command line `args` describes, on this rank."""
    world = world_of(cpu_world)
    return prepare(resolve(list(args), world), world)


def world_of(cpu_world: ranks.CpuWorld) -> World:
    """The world as a run knows it."""
    return World(
        rank=cpu_world.rank,
        local_rank=cpu_world.local_rank,
        world_size=cpu_world.world_size,
        local_world_size=cpu_world.local_world_size,
    )


def train_run(run: Run, folder: Path, period: float = PERIOD_S) -> Run:
    """The run after `launch.training.loop.train`, its metrics in `folder`; `period` as in `Consensus`."""
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    parts = loop_parts(run, folder)
    parts.requests.consensus.period = period
    train(run, *parts)
    finish(run, *parts)
    return run


class LoopParts(NamedTuple):
    """What `train`, `save` and `finish` of `launch.training.loop` take after the run."""

    metrics: Metrics
    checkpoints: CheckpointWriter
    requests: Requests


def loop_parts(
    run: Run, folder: Path, console: Console | None = None, stop_request: StopRequest | None = None
) -> LoopParts:
    """As `launch.training.trainer` makes them. Collective."""
    metrics = Metrics(run, folder, console or Console(False))
    checkpoints = CheckpointWriter(run, folder, versions())
    return LoopParts(metrics, checkpoints, Requests(metrics, checkpoints, stop_request))


def uninterrupted_losses(folder: Path, *args: str, ranks: int = 1) -> list[float]:
    """The losses of the run that the command line `args` describes and that nothing happens to, without
    starting a command.
    """
    run_ranks(ranks, train_uninterrupted, folder, args)
    return metric_values(folder)


def train_uninterrupted(cpu_world: ranks.CpuWorld, folder: Path, args: tuple[str, ...]) -> None:
    train_run(run_from_argv(cpu_world, *args, "workers=0"), folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metric_values(folder: Path, name: str = "loss") -> list[float]:
    """One number of the training lines, by step."""
    return [line[name] for line in read_metrics(folder) if name in line]


def single_rank() -> ranks.CpuWorld:
    """The world of a single process."""
    return ranks.CpuWorld(rank=0, local_rank=0, world_size=1, local_world_size=1)


def stream_samples(size: int, seed: int, start: int, stop: int) -> list[StreamSample]:
    """The samples at positions [start, stop) of the stream over a data set of `size` samples."""
    return as_samples(np.stack(sample_indices(size, seed, np.arange(start, stop))))


def as_samples(indices: SampleIndices) -> list[StreamSample]:
    """The columns of a sampler's array, sample by sample."""
    return [(epoch, index) for epoch, index in indices.T.tolist()]
