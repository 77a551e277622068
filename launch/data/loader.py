"""The order of the samples and the loaders: which rank sees what, when.

Samples form one endless stream, epoch after epoch, each epoch a new permutation. Step `s` takes positions
[s*B, (s+1)*B) for the global batch size B; its micro-batches are cut by position and dealt to the ranks. So
every global batch is full, no sample is dropped or seen twice in an epoch, order and micro-batches do not
depend on the number of ranks, and any step is found in O(1).
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from launch.runtime.cpus import usable_cpus
from launch.runtime.seeding import sample_seeds, seed_sample
from launch.runtime.world import World
from recipes.parts.data import Batch, Dataset, InMemoryDataset
from recipes.parts.permutation import Permutation

Numbers = NDArray[np.int64]
SampleIndices = Numbers
"""[2, n]: epoch and index of each sample of a micro-batch"""
INDEX_CHUNK = 4096
"""samples whose places are computed at a time: numpy takes as long for one"""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut: batch_size = micro_batch_size x accumulation x world_size."""

    micro_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int

    @property
    def batch_size(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def micro_batch_index(self, micro_step: int) -> int:
        """Which micro-batch of the global batch this rank computes in its `micro_step`."""
        return micro_step * self.world_size + self.rank


class TrainSampler(Sampler[SampleIndices]):
    """This rank's micro-batches from step `start` to `stop`; a DistributedSampler whose order needs no list
    of N numbers.
    """

    def __init__(self, size: int, batch_plan: BatchPlan, seed: int, start: int, stop: int) -> None:
        self.size, self.batch_plan, self.seed, self.start, self.stop = size, batch_plan, seed, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.batch_plan.accumulation_steps

    def __iter__(self) -> Iterator[SampleIndices]:
        batch_plan, micro = self.batch_plan, self.batch_plan.micro_batch_size
        in_step = np.array(
            [
                batch_plan.micro_batch_index(micro_step) * micro
                for micro_step in range(batch_plan.accumulation_steps)
            ]
        )[:, None] + np.arange(micro)
        ahead = max(INDEX_CHUNK // in_step.size, 1)
        for first in range(self.start, self.stop, ahead):
            steps = np.arange(first, min(first + ahead, self.stop))
            epochs, indices = sample_indices(
                self.size,
                self.seed,
                (steps[:, None, None] * batch_plan.batch_size + in_step).reshape(-1, micro),
            )
            yield from np.stack([epochs, indices], axis=1)


def sample_indices(size: int, seed: int, positions: Numbers) -> tuple[Numbers, Numbers]:
    """Epoch and index of the samples at `positions` (any shape) of the stream over a data set of `size`
    samples.
    """
    epochs, within = np.divmod(positions, size)
    indices = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = Permutation(size, seed, epoch)(within[here])
    return epochs, indices


class EvalSampler(Sampler[SampleIndices]):
    """Micro-batches of each sample once, in order, dealt to the ranks; a short rank repeats the first, which
    is not counted.

    Repeating keeps the ranks in step: under FSDP and ZeRO-3 a forward pass is a collective.
    """

    def __init__(self, size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        self.size, self.micro_batch_size, self.rank, self.world_size = (
            size,
            micro_batch_size,
            rank,
            world_size,
        )
        self.batches = -(-size // micro_batch_size)

    def __len__(self) -> int:
        return -(-self.batches // self.world_size)

    def counts(self, micro_step: int) -> bool:
        """Whether this rank's `micro_step` is a micro-batch of its own, not a repetition."""
        return micro_step * self.world_size + self.rank < self.batches

    def __iter__(self) -> Iterator[SampleIndices]:
        for micro_step in range(len(self)):
            first = (
                (micro_step * self.world_size + self.rank) * self.micro_batch_size
                if self.counts(micro_step)
                else 0
            )
            indices = np.arange(first, min(first + self.micro_batch_size, self.size))
            yield np.stack([np.zeros_like(indices), indices])


class SeededDataset(TorchDataset[Any]):
    """Samples one by one, whose random augmentation is a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int, split: str) -> None:
        self.dataset, self.seed, self.split = dataset, seed, split

    def __getitems__(self, draws: SampleIndices) -> list[Any]:
        return [self.sample(epoch, index) for epoch, index in draws.T.tolist()]

    def sample(self, epoch: int, index: int) -> Any:
        """Sample `index` as it is in `epoch`."""
        seed_sample(self.seed, self.split, epoch, index)
        return self.dataset[index]


class SeededBatches(TorchDataset[Any]):
    """The same for data that gives whole micro-batches."""

    def __init__(self, dataset: InMemoryDataset, seed: int, split: str) -> None:
        self.dataset, self.seed, self.split = dataset, seed, split

    def __getitems__(self, draws: SampleIndices) -> Batch:
        epochs, indices = draws
        seeds = partial(
            sample_seeds, epochs, indices, self.seed, self.split
        )  # asked for where something is drawn
        return self.dataset.batch(torch.from_numpy(indices), seeds)


@dataclass(frozen=True)
class InMemoryLoader:
    """A loader for data that lies in memory: no processes, no queues."""

    batches: SeededBatches
    sampler: Sampler[SampleIndices]
    device: str

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # ours have a length

    def __iter__(self) -> Iterator[Batch]:
        for draws in self.sampler:
            yield pinned(self.batches.__getitems__(draws), self.device)


Loader = DataLoader[Any] | InMemoryLoader


def loader(
    dataset: Dataset,
    sampler: Sampler[SampleIndices],
    seed: int,
    split: str,
    workers: int,
    world: World,
    persistent: bool = False,
) -> Loader:
    """Collated micro-batches, pinned if they go to a GPU from the host. Its processes outlast an iteration if
    `persistent`.
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
    """The collation of what is collated."""
    return batch


def worker_init(worker: int) -> None:  # noqa: ARG001
    """A data worker ends when its rank does, by whatever way, and not before.

    Schedulers and torchrun signal whole process groups: a worker that ended at once would make its rank fail,
    which is about to stop in good order. And a rank that is killed cannot end its workers: the system does
    (`man 2 PR_SET_PDEATHSIG`).
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


PR_SET_PDEATHSIG = 1


def default_workers(world: World) -> int:
    """Loading processes per rank: the CPUs that this process may use, shared by the node's ranks, one kept
    for the step.
    """
    return max(min(usable_cpus() // world.local_world_size - 1, 8), 0)


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(part, change) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [map_tensors(part, change) for part in batch]
    return batch


def pinned(batch: Batch, device: str) -> Batch:
    """The batch, in memory from which a copy to `device` need not be waited for."""
    if device == "cpu":
        return batch
    return map_tensors(batch, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())


def to_device(batch: Batch, device: str, channels_last: bool = False) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory do not block. Images for a GPU in the
    layout asked for.

    The activations follow them. Weights in that layout would not do: FSDP2 refuses them, and ZeRO flattens
    them.
    """
    moved = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return map_tensors(moved, to_channels_last) if channels_last and device != "cpu" else moved


def to_channels_last(tensor: Tensor) -> Tensor:
    """Images, float [n, channels, height, width], with the channels of a pixel side by side in memory; others
    as they are.
    """
    if tensor.ndim != 4 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def group_micro_batches(loader: Loader, accumulation_steps: int) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step at a time."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == accumulation_steps:
            yield batches
            batches = []


def prefetch(steps: Iterator[list[Batch]], device: str, channels_last: bool) -> Iterator[list[Batch]]:
    """The micro-batches of each step on `device`; on a GPU those of the next one are made ready while this
    one is computed.
    """
    if device == "cpu":
        yield from steps
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has left it so
    side.wait_stream(torch.cuda.current_stream())  # for data that were moved to the GPU
    ready = copy_next(side, steps, device, channels_last)
    while ready is not None:
        following = copy_next(side, steps, device, channels_last)
        yield wait_for_copy(*ready)
        ready = following


def copy_next(
    side: torch.cuda.Stream, steps: Iterator[list[Batch]], device: str, channels_last: bool
) -> tuple[list[Batch], torch.cuda.Event] | None:
    """The next micro-batches, and when they will be ready. Data on the GPU make theirs there: on the same
    stream, too.
    """
    with torch.cuda.stream(side):
        batches = next(steps, None)
        return (
            None
            if batches is None
            else ([to_device(b, device, channels_last) for b in batches], side.record_event())
        )


def wait_for_copy(batches: list[Batch], event: torch.cuda.Event) -> list[Batch]:
    """The batches, for whose copies the computation waits; their memory is kept until it is done with them."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for tensor in tensors_of(batches):
        tensor.record_stream(stream)
    return batches


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch, or in a model's output of any form."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(part)
