"""The loaders: data workers, collation, pinned memory, and augmentation by the seed of each sample."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from launch.data.batch import pin_memory
from launch.data.sampler import SampleIndices
from launch.runtime.cpus import usable_cpus
from launch.runtime.seeding import sample_seeds, seed_sample
from launch.runtime.world import World
from recipes.parts.data import Batch, Dataset, InMemoryDataset

PR_SET_PDEATHSIG = 1
"""of <linux/prctl.h>"""


class SeededDataset(TorchDataset[Any]):
    """Samples one by one, whose random augmentation is a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int, split: str) -> None:
        self.dataset, self.seed, self.split = dataset, seed, split

    def __getitems__(self, indices: SampleIndices) -> list[Any]:
        return [self.sample(epoch, index) for epoch, index in indices.T.tolist()]

    def sample(self, epoch: int, index: int) -> Any:
        """Sample `index` as it is in `epoch`."""
        seed_sample(self.seed, self.split, epoch, index)
        return self.dataset[index]


class SeededBatches(TorchDataset[Any]):
    """The same for data sets that give whole micro-batches."""

    def __init__(self, dataset: InMemoryDataset, seed: int, split: str) -> None:
        self.dataset, self.seed, self.split = dataset, seed, split

    def __getitems__(self, epochs_and_indices: SampleIndices) -> Batch:
        epochs, indices = epochs_and_indices
        seeds = partial(sample_seeds, epochs, indices, self.seed, self.split)  # for what is augmented only
        return self.dataset.batch(torch.from_numpy(indices), seeds)


@dataclass(frozen=True)
class InMemoryLoader:
    """A loader for data in memory: no worker processes, no queues."""

    batches: SeededBatches
    sampler: Sampler[SampleIndices]
    device: str

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # ours have a length

    def __iter__(self) -> Iterator[Batch]:
        for indices in self.sampler:
            yield pin_memory(self.batches.__getitems__(indices), self.device)


Loader = DataLoader[Any] | InMemoryLoader


def build_loader(
    dataset: Dataset,
    sampler: Sampler[SampleIndices],
    seed: int,
    split: str,
    workers: int,
    world: World,
    persistent: bool = False,
) -> Loader:
    """A loader of collated micro-batches, in pinned memory if they go from the host to a GPU. Its workers
    outlive an iteration if `persistent`.
    """
    batches = SeededBatches(dataset, seed, split) if isinstance(dataset, InMemoryDataset) else None
    if batches and not workers:
        return InMemoryLoader(batches, sampler, world.device)
    return DataLoader(
        batches or SeededDataset(dataset, seed, split),
        batch_sampler=sampler,  # type: ignore[arg-type]  # it hands on whatever comes
        num_workers=workers,
        collate_fn=identity_collate if batches else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=world.device != "cpu",
        worker_init_fn=worker_init,
    )


def identity_collate(batch: Batch) -> Batch:
    """Collation for batches that are collated already."""
    return batch


def worker_init(worker: int) -> None:  # noqa: ARG001
    """In a new data worker: let it end when its rank does, however that ends, and not before.

    Schedulers and torchrun signal whole process groups: a worker that ended at once would make its rank fail
    while it saves and stops. And a rank that is killed cannot end its workers: the kernel does
    (`man 2 PR_SET_PDEATHSIG`).
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def default_workers(world: World) -> int:
    """Data workers per rank: the CPUs that this process may use, divided among the node's ranks, one of them
    kept for the step; at most 8.
    """
    return max(min(usable_cpus() // world.local_world_size - 1, 8), 0)
