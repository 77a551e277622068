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

from launch.checkpoint.writer import CheckpointWriter
from launch.runtime.rendezvous import process_group
from launch.runtime.world import World
from launch.training.loop import train
from recipes.parts.data import Batch
from tests.benchmarks.gpu_rows import GpuSettings, Measurement
from tests.benchmarks.gpu_rows.gpu_workloads import GpuWorkload
from tests.benchmarks.gpu_rows.hardware_limits import copy_bandwidth
from tests.benchmarks.gpu_rows.loop_overhead import run_of
from tests.benchmarks.gpu_rows.optimizations import fastest, with_fitting_batch
from tests.benchmarks.gpu_rows.timing import WARM_UP, synchronized_time

SAVES = 6
"""of which the first does not count"""


class SaveTiming(NamedTuple):
    """Seconds and bytes of one."""

    blocking_s: float
    """by the saver's clock: until the copies are queued"""
    copy_bandwidth: float
    """until they are made: the next step comes after them on the device"""
    size: int


def rows(settings: GpuSettings) -> Iterator[Measurement]:
    """The same saves by two clocks."""
    for name, seconds in CLOCKS.items():
        yield Measurement(section="checkpoint", name=name, measure=partial(against_floor, settings, seconds))


CLOCKS: dict[str, Callable[[SaveTiming], float]] = {
    "stall that the saver reports": lambda save: save.blocking_s,
    "until the device goes on": lambda save: save.copy_bandwidth,
}


def against_floor(settings: GpuSettings, seconds: Callable[[SaveTiming], float]) -> dict[str, Any]:
    """`raw_ms` is the floor."""
    saves = made(settings)
    size = saves[0].size
    found, floor = median(seconds(save) for save in saves), size / copy_bandwidth(settings, "device", "host")
    return {"ms": found * 1e3, "raw_ms": floor * 1e3, "ratio": found / floor, "note": f"{decimal(size)}"}


@cache
def made(settings: GpuSettings) -> list[SaveTiming]:
    """Saves of a run of GPT-2, a step between them, each of them on disk before the next."""
    with process_group(World(), "single") as world, TemporaryDirectory() as folder:
        return with_fitting_batch(fastest(settings, "gpt"), partial(saved, world, Path(folder)))


def saved(world: World, folder: Path, workload: GpuWorkload) -> list[SaveTiming]:
    """Of one run."""
    saves: list[SaveTiming] = []
    with run_of(workload, "single", world, folder, keep=1) as (run, parts):
        steps = run.train_steps
        run.train_steps = lambda: saving(steps(), parts.checkpoints, workload.device, saves)  # type: ignore[method-assign]
        train(run, *parts)
    return saves[1:]


def saving(
    steps: Iterator[list[Batch]], checkpoints: CheckpointWriter, device: str, saves: list[SaveTiming]
) -> Iterator[list[Batch]]:
    """Pass `steps` on, and save between them."""
    yield from islice(steps, WARM_UP)
    for _ in range(SAVES):
        yield next(steps)
        start = synchronized_time(device)
        checkpoints.save()
        seconds = synchronized_time(device) - start
        done = checkpoints.wait()
        assert done is not None
        assert not done.error, done.error
        saves.append(SaveTiming(done.blocking_s, seconds, done.size))
