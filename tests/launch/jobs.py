"""Runs inside a test: the loop, the record and the checkpoints, without the command around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from launch.cli.resolve import resolve
from launch.data.loader import Draws, places
from launch.reporting.console import Screen
from launch.reporting.metrics import Record
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.run import Job, prepare
from launch.training.loop import train
from launch.watchdog.consensus import PERIOD
from tests import ranks
from tests.ranks import run_ranks

Draw = tuple[int, int]
"""(epoch, index): one sample of the stream"""


def job_of(place: ranks.World, recipe: str, *words: str) -> Job:
    """The run that the command line describes, of a recipe of `tests.launch.tiny`, on this rank."""
    return made(place, f"recipe=tests.launch.tiny:{recipe}", "workers=0", *words)


def made(place: ranks.World, *words: str) -> Job:
    """The run that the command line `words` describes, on this rank."""
    world = world_of(place)
    return prepare(resolve(list(words), world), world)


def world_of(place: ranks.World) -> World:
    """The place as a run knows it."""
    return World(
        rank=place.rank, local_rank=place.local_rank, world_size=place.world_size, local_world_size=place.local_world_size
    )


def trained(job: Job, folder: Path, period: float = PERIOD) -> Job:
    """The job after `launch.training.loop.train`, its record in `folder`. `period`: as the ranks agree, between steps, in seconds."""
    if job.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    record = Record(job, folder, versions(), Screen(False))
    record.agreement.period = period
    train(job, record)
    record.settle()
    return job


def undisturbed(folder: Path, *words: str, ranks: int = 1) -> list[float]:
    """The losses of the run that the command line `words` describes and that nothing happens to, without starting a command."""
    run_ranks(ranks, straight, folder, words)
    return series(folder)


def straight(place: ranks.World, folder: Path, words: tuple[str, ...]) -> None:
    trained(made(place, *words, "workers=0"), folder)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str = "loss") -> list[float]:
    """One number of the training lines, by step."""
    return [line[name] for line in lines_of(folder) if name in line]


def alone() -> ranks.World:
    """The place of a process without others."""
    return ranks.World(rank=0, local_rank=0, world_size=1, local_world_size=1)


def draws(size: int, seed: int, start: int, stop: int) -> list[Draw]:
    """The samples at positions [start, stop) of the stream over a data set of `size` samples."""
    return pairs(np.stack(places(size, seed, np.arange(start, stop))))


def pairs(draws: Draws) -> list[Draw]:
    """Sample by sample."""
    return [(epoch, index) for epoch, index in draws.T.tolist()]
