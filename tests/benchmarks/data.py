"""What the order of the samples costs, whether it is a fair shuffle, and how fast a run gets its batches.

    OMP_NUM_THREADS=1 python tests/benchmarks/data.py rounds=10 json=data.json

Order: rankzero's `TrainSampler` against torch's `DistributedSampler`, on one of 8 ranks: peak memory
(tracemalloc sees Python's and numpy's, not torch's own) and time to the first index after a seek to the
middle of an epoch, which for torch's means to draw the epoch and pass over what was seen; and the time to
compute 64 indices of 1e12 samples. Uniformity: over
many epochs of 12 samples, how often each sample comes to each place, and how often each pair of neighbors;
p-values of chi-square tests, of which one in twenty is below 0.05 for a perfect shuffle. Loading: the batches
of `recipe=mnist` through the loader that a run of it would have, and through torch's DataLoader with no
workers, over the same 60,000 images of 28 x 28 bytes without augmentation; interleaved, the ratio is of
times, so below 1 is faster.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from launch.cli.command import read_command
from launch.cli.resolve import resolve
from launch.data.batch_plan import BatchPlan
from launch.data.sampler import TrainSampler
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from recipes.parts.image_files import MNIST_FILES
from recipes.parts.permutation import Permutation
from tests.benchmarks.benchmark_report import Report, interleave, ratios

COLUMNS = {
    **{
        "what": "<38",
        "samples": ">20,d",
        "memory_mb": ">11.3f",
        "torch_mb": ">11.3f",
        "seek_ms": ">10.2f",
        "torch_ms": ">10.2f",
        "indices_us": ">10.1f",
    },
    **{"p": ">7.3f", "ratio": ">7.3f", "low": ">7.3f", "high": ">7.3f", "per_second": ">12,.0f", "aim": ""},
}
RANKS, BATCH = 8, 256


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    rounds: int = 10
    """A B B A of the loading"""
    largest: float = 1e7
    """samples up to which torch's sampler is measured too"""
    ours_to: float = 1e12
    """samples up to which rankzero's is measured"""
    shuffles: int = 20_000
    """epochs that are drawn for the test of uniformity"""
    json: str | None = None
    """file for the rows as JSON, with machine and versions"""


def main(argv: list[str]) -> None:
    """Print the table."""
    options = read_command(argv, __doc__, Options, name="data.py").options
    report = Report(options.json, COLUMNS)
    for power in range(4, 13):
        size = 10**power
        if size <= options.ours_to:
            report.row(what="order", samples=size, **order(size, with_torch=size <= options.largest))
    report.row(what="64 indices", samples=10**12, indices_us=microseconds_of_indices(), aim="<= 200")
    for what, counts in uniformity(options.shuffles).items():
        report.row(what=what, p=float(chisquare(counts).pvalue))
    report.row(what="loading, against a DataLoader", **loading(options.rounds))


# order ------------------------------------------------------------------------------------------------------


def order(size: int, with_torch: bool) -> dict[str, float]:
    """Memory in 1e6 bytes and milliseconds of both."""
    middle = size // 2 // BATCH

    def ours() -> None:
        batch_plan = BatchPlan(
            micro_batch_size=BATCH // RANKS, accumulation_steps=1, rank=3, world_size=RANKS
        )
        next(iter(TrainSampler(size, batch_plan, 0, middle, middle + 10**6)))

    def theirs() -> None:
        # only the length of the data counts
        sampler: DistributedSampler[Any] = DistributedSampler(range(size), RANKS, 3, shuffle=True)  # type: ignore[arg-type]
        next(islice(sampler, middle * BATCH // RANKS, None))

    found = dict(zip(("memory_mb", "seek_ms"), cost(ours), strict=True))
    return found | (dict(zip(("torch_mb", "torch_ms"), cost(theirs), strict=True)) if with_torch else {})


def microseconds_of_indices(count: int = 64) -> float:
    """Of one call that computes `count` indices of 1e12 samples, far into an epoch; the best of many."""
    permutation = Permutation(10**12, 0, 1)
    positions = np.arange(1_000_000, 1_000_000 + count)
    return min(timeit.repeat(lambda: permutation(positions), number=20, repeat=20)) / 20 * 1e6


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Peak of tracemalloc in 1e6 bytes, and milliseconds without it; the second time counts, when all is
    imported.
    """
    work()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6, seconds * 1e3


def uniformity(shuffles: int, size: int = 12) -> dict[str, np.ndarray[Any, Any]]:
    """Counts that are all alike, but for chance, if every order is as likely as any other."""
    sample_indices, neighbors = np.zeros((size, size), int), np.zeros((size, size), int)
    for epoch in range(shuffles):
        shuffled = Permutation(size, 0, epoch)(np.arange(size))
        sample_indices[np.arange(size), shuffled] += 1
        # pairs of one shuffle are not independent of each other: one pair of each
        neighbors[tuple(shuffled[epoch % (size - 1) :][:2])] += 1
    # the samples of one shuffle are not independent either: one place of each
    return {
        "uniform: first place": sample_indices[0],
        "uniform: last place": sample_indices[-1],
        "uniform: pairs of neighbors": neighbors[~np.eye(size, dtype=bool)],
        "uniform: a large set, by thousandths": large(),
    }


def large(size: int = 10**12, drawn: int = 200_000) -> np.ndarray[Any, Any]:
    """Where neighboring positions of 1e12 samples go."""
    return np.bincount(Permutation(size, 0, 0)(np.arange(drawn)) * 1000 // size, minlength=1000)


# loading ----------------------------------------------------------------------------------------------------


class ImagesInMemory:
    """The data set that one writes for images in memory."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.images[index, None].float() / 255 - 0.1307) / 0.3081, self.classes[index]


def write_images(folder: Path, size: int = 60_000) -> tuple[Tensor, Tensor]:
    """Noise in the files of MNIST (IDX: two zeros, 8 for bytes, the number of sizes, the sizes, the data)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 28, 28), dtype=torch.uint8, generator=generator)
    classes = torch.randint(10, (size,), dtype=torch.uint8, generator=generator)
    for name, tensor in zip(MNIST_FILES, (images, classes, images[:100], classes[:100]), strict=True):
        sizes = b"".join(length.to_bytes(4, "big") for length in tensor.shape)
        (folder / name).write_bytes(bytes((0, 0, 8, tensor.ndim)) + sizes + tensor.numpy().tobytes())
    return images, classes.long()


def prepared_run(folder: Path) -> Run:
    """The run that the command line would prepare."""
    words = (
        "recipe=mnist",
        "data.name=mnist",
        f"data.root={folder}",
        "data.augment=false",
        "data.val=0",
        "micro_batch_size=64",
    )
    return prepare(resolve(words, World()), World())


def loading(rounds: int, batches: int = 100) -> dict[str, Any]:
    """Seconds from batch to batch."""
    with tempfile.TemporaryDirectory() as folder:
        theirs: Any = DataLoader(ImagesInMemory(*write_images(Path(folder))), batch_size=64, shuffle=True)  # type: ignore[arg-type]
        loader = prepared_run(Path(folder)).train_loader()

    def timed(batches_of: Any) -> float:
        iterator = iter(batches_of)
        next(iterator)  # starts the workers, if there are any
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        return (time.perf_counter() - start) / batches

    pairs = interleave(lambda: timed(theirs), lambda: timed(loader), rounds)
    return {
        "samples": 60_000,
        "per_second": 64 / sorted(b for _, b in pairs)[len(pairs) // 2],
        **ratios(pairs),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
