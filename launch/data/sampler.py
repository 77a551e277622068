"""The order of the samples: which rank sees what, when.

Samples form one endless stream, epoch after epoch, each epoch a new permutation. Step `s` takes positions
[s*B, (s+1)*B) for the global batch size B; its micro-batches are cut by position and dealt to the ranks in
turn. So every global batch is full, no sample is dropped or seen twice in an epoch, order and micro-batches
do not depend on the number of ranks, and any step is found in O(1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from launch.data.batch_plan import BatchPlan
from recipes.parts.permutation import Permutation

IntArray = NDArray[np.int64]

SampleIndices = IntArray
"""[2, n]: epoch and index of each sample of a micro-batch"""

INDEX_CHUNK = 4096
"""samples whose indices are computed by one numpy call, which takes as long for a single one"""


class TrainSampler(Sampler[SampleIndices]):
    """This rank's micro-batches from step `start` to `stop`: a DistributedSampler that starts at any step and
    keeps no list of N numbers.
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
        chunk = max(INDEX_CHUNK // in_step.size, 1)
        for first in range(self.start, self.stop, chunk):
            steps = np.arange(first, min(first + chunk, self.stop))
            epochs, indices = sample_indices(
                self.size,
                self.seed,
                (steps[:, None, None] * batch_plan.batch_size + in_step).reshape(-1, micro),
            )
            yield from np.stack([epochs, indices], axis=1)


def sample_indices(size: int, seed: int, positions: IntArray) -> tuple[IntArray, IntArray]:
    """Epoch and index of the samples at `positions` (any shape) of the stream over a data set of `size`
    samples.
    """
    epochs, within = np.divmod(positions, size)
    indices = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        indices[in_epoch] = Permutation(size, seed, epoch)(within[in_epoch])
    return epochs, indices


class EvalSampler(Sampler[SampleIndices]):
    """Micro-batches of each sample once, in order, dealt to the ranks in turn; a rank that has one less
    repeats the first, which does not count.

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
        """Whether this rank's `micro_step`-th micro-batch is one of its own, not a repetition."""
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
