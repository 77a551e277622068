"""Runs inside a test: the loop, the record and the checkpoints, without the command around them."""

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
from launch.training.requests import Requests
from launch.watchdog.consensus import PERIOD_S
from launch.watchdog.stop import StopRequest
from tests import ranks
from tests.ranks import run_ranks

Draw = tuple[int, int]
"""(epoch, index): one sample of the stream"""


def job_of(phase: ranks.CpuWorld, recipe: str, *words: str) -> Run:
    """The run that the command line describes, of a recipe of `tests.launch.tiny`, on this rank."""
    return made(phase, f"recipe=tests.launch.tiny:{recipe}", "workers=0", *words)


def made(phase: ranks.CpuWorld, *words: str) -> Run:
    """The run that the command line `words` describes, on this rank."""
    world = world_of(phase)
    return prepare(resolve(list(words), world), world)


def world_of(phase: ranks.CpuWorld) -> World:
    """The place as a run knows it."""
    return World(
        rank=phase.rank,
        local_rank=phase.local_rank,
        world_size=phase.world_size,
        local_world_size=phase.local_world_size,
    )


def trained(run: Run, folder: Path, period: float = PERIOD_S) -> Run:
    """The job after `launch.training.loop.train`, its record in `folder`. `period`: as the ranks agree,
    between steps, in seconds.
    """
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


def undisturbed(folder: Path, *words: str, ranks: int = 1) -> list[float]:
    """The losses of the run that the command line `words` describes and that nothing happens to, without
    starting a command.
    """
    run_ranks(ranks, straight, folder, words)
    return series(folder)


def straight(phase: ranks.CpuWorld, folder: Path, words: tuple[str, ...]) -> None:
    trained(made(phase, *words, "workers=0"), folder)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str = "loss") -> list[float]:
    """One number of the training lines, by step."""
    return [line[name] for line in lines_of(folder) if name in line]


def alone() -> ranks.CpuWorld:
    """The place of a process without others."""
    return ranks.CpuWorld(rank=0, local_rank=0, world_size=1, local_world_size=1)


def draws(size: int, seed: int, start: int, stop: int) -> list[Draw]:
    """The samples at positions [start, stop) of the stream over a data set of `size` samples."""
    return pairs(np.stack(sample_indices(size, seed, np.arange(start, stop))))


def pairs(draws: SampleIndices) -> list[Draw]:
    """Sample by sample."""
    return [(epoch, index) for epoch, index in draws.T.tolist()]
