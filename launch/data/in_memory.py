"""Data sets in memory: a whole micro-batch by one index, on the GPU where they fit, without workers or
collation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from launch.data.batch import tensors_of
from recipes.parts.data import InMemoryDataset
from recipes.parts.split import PermutedView

GPU_MEMORY_FRACTION = 0.1
"""of a GPU's free memory that a data set may take: the model comes after it"""


def as_in_memory(dataset: Any) -> InMemoryDataset | None:
    """`dataset` as one that gives whole micro-batches; None if it is not in memory."""
    if isinstance(dataset, InMemoryDataset):
        return dataset
    if type(dataset) is TensorDataset:
        return TensorData(dataset.tensors)
    if type(dataset) is PermutedView and (inner := as_in_memory(dataset.dataset)):
        order = dataset.permutation(torch.arange(dataset.start, dataset.start + dataset.length).numpy())
        return IndexedView(inner, torch.from_numpy(order))
    if type(dataset) is Subset and (inner := as_in_memory(dataset.dataset)):
        return IndexedView(inner, torch.as_tensor(dataset.indices))
    return None


def to_device_if_small(dataset: InMemoryDataset, device: str) -> InMemoryDataset:
    """The data set on `device`, if it takes little of its free memory."""
    if device == "cpu" or dataset.nbytes > GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]:
        return dataset
    return dataset.to(device)


def is_on_gpu(dataset: InMemoryDataset) -> bool:
    """Whether its batches come from the memory of a GPU."""
    first = torch.zeros(1, dtype=torch.int64)
    return any(tensor.is_cuda for tensor in tensors_of(dataset.batch(first, lambda: first)))


class TensorData:
    """A `TensorDataset`: row i of each tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int, /) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: str) -> TensorData:
        """The same rows in the memory of `device`."""
        return TensorData([tensor.to(device) for tensor in self.tensors])

    def batch(self, indices: Tensor, seeds: Callable[[], Tensor]) -> list[Tensor]:  # noqa: ARG002  # nothing is drawn
        """The rows at `indices`."""
        return [tensor[indices.to(tensor.device)] for tensor in self.tensors]


class IndexedView:
    """The samples of `dataset` at `order`, int64 on the host: a part of it, or all of it permuted."""

    def __init__(self, dataset: InMemoryDataset, order: Tensor) -> None:
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int, /) -> object:
        return self.dataset[int(self.order[index])]

    @property
    def nbytes(self) -> int:
        """Of the whole data set: its views share it."""
        return self.dataset.nbytes

    def to(self, device: str) -> IndexedView:
        """The same samples in the memory of `device`."""
        return IndexedView(self.dataset.to(device), self.order)

    def batch(self, indices: Tensor, seeds: Callable[[], Tensor]) -> object:
        """The samples at `indices` of this view."""
        return self.dataset.batch(self.order[indices], seeds)
