"""What a checkpoint makes the training wait for, against a plain copy of as many bytes into pinned host
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.filesize import decimal

from launch.reporting.metrics import Metrics
from launch.runtime.rendezvous import process_group
from launch.runtime.world import World
from launch.training.loop import train
from recipes.parts.data import Batch
from tests.benchmarks.gpu_rows import Bench, Row
from tests.benchmarks.gpu_rows.ceilings import copied
from tests.benchmarks.gpu_rows.duels import run_of
from tests.benchmarks.gpu_rows.ladders import fitting, top
from tests.benchmarks.gpu_rows.models import Rung
from tests.benchmarks.gpu_rows.timing import WARM_UP, now

SAVES = 6
"""of which the first does not count"""


class Save(NamedTuple):
    """Seconds and bytes of one."""

    blocking_s: float
    """by the saver's clock: until the copies are queued"""
    copied: float
    """until they are made: the next step comes after them on the device"""
    size: int


def rows(bench: Bench) -> Iterator[Row]:
    """The same saves by two clocks."""
    for name, seconds in CLOCKS.items():
        yield Row(section="checkpoint", name=name, measure=partial(against_floor, bench, seconds))


CLOCKS: dict[str, Callable[[Save], float]] = {
    "stall that the saver reports": lambda save: save.blocking_s,
    "until the device goes on": lambda save: save.copied,
}


def against_floor(bench: Bench, seconds: Callable[[Save], float]) -> dict[str, Any]:
    """`raw_ms` is the floor."""
    saves = made(bench)
    size = saves[0].size
    found, floor = median(seconds(save) for save in saves), size / copied(bench, "device", "host")
    return {"ms": found * 1e3, "raw_ms": floor * 1e3, "ratio": found / floor, "note": f"{decimal(size)}"}


@cache
def made(bench: Bench) -> list[Save]:
    """Saves of a run of GPT-2, a step between them, each of them on disk before the next."""
    with process_group(World(), "single") as world, TemporaryDirectory() as folder:
        return fitting(top(bench, "gpt"), partial(saved, world, Path(folder)))


def saved(world: World, folder: Path, rung: Rung) -> list[Save]:
    """Of one run."""
    saves: list[Save] = []
    with run_of(rung, "single", world, folder, keep=1) as (run, metrics):
        steps = run.train_steps
        run.train_steps = lambda: saving(steps(), metrics, rung.device, saves)  # type: ignore[method-assign]
        train(run, metrics)
    return saves[1:]


def saving(
    steps: Iterator[list[Batch]], metrics: Metrics, device: str, saves: list[Save]
) -> Iterator[list[Batch]]:
    """Pass `steps` on, and save between them."""
    yield from islice(steps, WARM_UP)
    for _ in range(SAVES):
        yield next(steps)
        start = now(device)
        metrics.checkpoint_writer.save()
        seconds = now(device) - start
        done = metrics.checkpoint_writer.wait()
        assert done is not None
        assert not done.error, done.error
        saves.append(Save(done.blocking_s, seconds, done.size))
