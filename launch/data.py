"""The order of the samples and the loaders: which rank sees what, when.

Samples form one endless stream, epoch after epoch, each epoch a new permutation. Step `s` takes positions [s*B, (s+1)*B)
for the global batch size B; its micro-batches are cut by position and dealt to the ranks. So every global batch is full, no
sample is dropped or seen twice in an epoch, order and micro-batches do not depend on the number of ranks, and any step is
found in O(1).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from launch.seeding import seed_sample
from launch.world import World
from recipes.base import Batch, Dataset
from recipes.parts.permutation import Permutation

Draw = tuple[int, int]
"""(epoch, index): one sample of the stream"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a global batch is cut: batch_size = micro_batch_size x accumulation x world_size."""

    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def batch_size(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation * self.world_size

    def position(self, turn: int) -> int:
        """Which micro-batch of the global batch this rank computes in its `turn`."""
        return turn * self.world_size + self.rank


class TrainSampler(Sampler[list[Draw]]):
    """This rank's micro-batches from step `start` to `stop`; a DistributedSampler whose order needs no list of N numbers."""

    def __init__(self, size: int, cut: Cut, seed: int, start: int, stop: int) -> None:
        self.size, self.cut, self.seed, self.start, self.stop = size, cut, seed, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.cut.accumulation

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.cut.micro_batch_size
        for step in range(self.start, self.stop):
            for turn in range(self.cut.accumulation):
                first = step * self.cut.batch_size + self.cut.position(turn) * micro
                yield draws(self.size, self.seed, first, first + micro)


def draws(size: int, seed: int, start: int, stop: int) -> list[Draw]:
    """The samples at positions [start, stop) of the stream over a data set of `size` samples."""
    found: list[Draw] = []
    while start < stop:
        epoch, first = divmod(start, size)
        last = min(first + stop - start, size)
        order = Permutation(size, seed, epoch)
        found += [(epoch, int(index)) for index in order(torch.arange(first, last).numpy())]
        start += last - first
    return found


class EvalSampler(Sampler[list[Draw]]):
    """Micro-batches of each sample once, in order, dealt to the ranks; a short rank repeats the first, which is not counted.

    Repeating keeps the ranks in step: under FSDP and ZeRO-3 a forward pass is a collective.
    """

    def __init__(self, size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        self.size, self.micro_batch_size, self.rank, self.world_size = size, micro_batch_size, rank, world_size
        self.batches = -(-size // micro_batch_size)

    def __len__(self) -> int:
        return -(-self.batches // self.world_size)

    def counts(self, turn: int) -> bool:
        """Whether this rank's `turn` is a micro-batch of its own, not a repetition."""
        return turn * self.world_size + self.rank < self.batches

    def __iter__(self) -> Iterator[list[Draw]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.micro_batch_size if self.counts(turn) else 0
            yield [(0, index) for index in range(first, min(first + self.micro_batch_size, self.size))]


class Seeded(TorchDataset[Any]):
    """A data set whose random augmentation is a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int, split: str) -> None:
        self.dataset, self.seed, self.split = dataset, seed, split

    def __getitem__(self, draw: Draw) -> Any:
        seed_sample(self.seed, self.split, *draw)
        return self.dataset[draw[1]]


def loader(dataset: Dataset, sampler: Sampler[list[Draw]], seed: int, split: str, workers: int, world: World) -> DataLoader[Any]:
    """Collated micro-batches on the host, pinned when they go to a GPU."""
    return DataLoader(
        Seeded(dataset, seed, split),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=world.device != "cpu",
        worker_init_fn=outlast_signals,
    )


def outlast_signals(worker: int) -> None:  # noqa: ARG001
    """A data worker ends when its rank does, by whatever way, and not before.

    Schedulers and torchrun signal whole process groups: a worker that ended at once would make its rank fail, which is about to
    stop in good order. And a rank that is killed cannot end its workers: the system does (`man 2 PR_SET_PDEATHSIG`).
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


PR_SET_PDEATHSIG = 1


def default_workers(world: World) -> int:
    """Loading processes per rank: the CPUs that this process may use, shared by the node's ranks, one kept for the step."""
    return max(min(len(os.sched_getaffinity(0)) // world.local_world_size - 1, 8), 0)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory do not block."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(part, device) for part in batch]
    return batch


def steps_of(loader: DataLoader[Any], accumulation: int) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step at a time."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == accumulation:
            yield batches
            batches = []
