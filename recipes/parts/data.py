"""The data contract: what a data set, its splits and a batch are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Batch = Any
"""what the default collation makes of a list of samples: tensors, or tuples, lists and dicts of tensors"""


class Dataset(Protocol):
    """A map-style data set: `len` and an index are all that is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class InMemoryDataset(Dataset, Protocol):
    """A data set in memory that gives a whole micro-batch at once: no worker processes, no
    collation.

    `torch.utils.data.TensorDataset` is taken for one by itself.
    """

    @property
    def nbytes(self) -> int:
        """What it holds: a small one is moved to the GPU."""

    def to(self, device: str) -> InMemoryDataset:
        """The same samples in the memory of `device`."""

    def batch(self, indices: Tensor, seeds: Callable[[], Tensor]) -> Batch:
        """The samples at `indices`, collated, where they lie. `indices`, and what `seeds` returns, are int64
        [n], on the host.

        An augmentation is a function of `seeds()` (`recipes.parts.augment.uniform`), and so not of ranks and
        workers.
        """


@dataclass(kw_only=True)
class Splits:
    """The data of a run. A split that is None is not evaluated."""

    train: Dataset
    val: Dataset | None = None
    test: Dataset | None = None


def num_samples(batch: Batch) -> int:
    """Number of samples of a collated batch: the first dimension of its first tensor."""
    while not hasattr(batch, "shape"):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return int(batch.shape[0])
