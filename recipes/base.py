"""The recipe contract: what is trained, declared. A recipe drives nothing and knows of no rank, device or strategy.

A recipe is one dataclass. Its fields are its part of the command line: nested dataclasses `model`, `data`, `optim` and
`schedule` make the keys `model.*`, `data.*`, `optim.*` and `schedule.*`, and the docstring under a field its line in `--help`.
Modules of built-in recipes import torch inside their methods only, so that a wrong key is answered before torch loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torchmetrics import Metric

Batch = Any
"""what the default collation makes of a list of samples: tensors, or tuples, lists and dicts of tensors"""

Losses = Mapping[str, "Callable[[dict[str, nn.Module], Batch], Tensor]"]


class Dataset(Protocol):
    """A map-style data set: `len` and an index are all that is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Resident(Dataset, Protocol):
    """A data set that lies in memory and gives a whole micro-batch at once: no worker processes, no collation.

    `torch.utils.data.TensorDataset` is taken for one by itself.
    """

    @property
    def nbytes(self) -> int:
        """What it holds: a small one is moved to the GPU."""

    def to(self, device: str) -> Resident:
        """The same samples in the memory of `device`."""

    def batch(self, indices: Tensor, seeds: Tensor) -> Batch:
        """The samples at `indices`, collated, where they lie; both arguments are int64 [n], on the host.

        An augmentation is a function of `seeds` (`recipes.parts.augment.uniform`), and so not of ranks and workers.
        """


@dataclass(kw_only=True)
class Splits:
    """The data of a run. A split that is None is not evaluated."""

    train: Dataset
    val: Dataset | None = None
    test: Dataset | None = None


@dataclass(kw_only=True)
class Recipe:
    """Base of all recipes: override `build_model`, `build_optimizer`, `build_data` and `loss`; the rest has a meaning."""

    defaults: ClassVar[dict[str, Any]] = {}
    """this recipe's defaults for keys of the run, e.g. {"batch_size": 64, "micro_batch_size": 16, "epochs": 10}"""
    unit: ClassVar[str] = "samples"
    """what `count` counts; a run's speed is told in it (`tokens`)"""
    objective: ClassVar[str] = "loss"
    """the evaluation metric that early stopping and reduce-on-plateau watch"""
    objective_mode: ClassVar[str] = "min"
    """`min` or `max`: which way the objective is better"""
    skip_nonfinite: ClassVar[bool] = False
    """leave out steps whose loss is NaN or infinite instead of stopping the run (costs a device synchronisation a step)"""
    may_change: ClassVar[tuple[str, ...]] = ("data.root", "data.path")
    """keys of this recipe that a resumed run may change: where the data lies, not what it is"""

    schedule: Schedule = field(default_factory=Schedule)

    # what every recipe says -------------------------------------------------------------------------------------------

    def build_data(self) -> Splits:
        """The data sets, each cheap to build on every rank. Raises FileNotFoundError or ValueError for the user to read."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The model on the host, initialised from torch's default generator (seeded by the caller)."""
        raise NotImplementedError

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer, over `model.parameters()` or over groups with their own learning rates."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss SUMMED over what `count` counts: a scalar. The engine divides once, by the count of the global batch."""
        raise NotImplementedError

    # what a recipe may say --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for fields that cannot work together. Called before torch is imported."""

    def count(self, batch: Batch) -> int | Tensor:
        """What the loss of `batch` sums over; default: its samples. A recipe with masked tokens counts the tokens."""
        return samples(batch)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:  # noqa: ARG002
        """The repeated parts of the model: the unit of activation checkpointing, compilation and sharding."""
        return ()

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For recipes with metrics: (loss as in `loss`, predictions, targets), the last two for each metric's `update`."""
        raise NotImplementedError

    def metrics(self) -> Mapping[str, Metric]:
        """Evaluation metrics by name. Without any, evaluation reports the loss alone and never calls `evaluate`."""
        return {}

    # several models ---------------------------------------------------------------------------------------------------

    def models(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Several models by name, as factories; default: one, called `model`."""
        return {"model": self.build_model}

    def optimizers(self) -> Mapping[str, Callable[[nn.Module], Optimizer]]:
        """The optimizer of each trained model, as factories. A model without one is held fixed (a teacher)."""
        return {"model": self.build_optimizer}

    def losses(self) -> Losses:
        """Who is trained by which loss, in order: each turn of a step trains one model while the others rest.

        Each loss takes all models by name and a batch, and returns a sum like `loss`.
        """
        return {"model": lambda models, batch: self.loss(models["model"], batch)}

    def score(self, models: dict[str, nn.Module], batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Evaluation of one batch: the losses by name, and (predictions, targets) if there are metrics."""
        if not self.metrics():
            return {name: loss(models, batch) for name, loss in self.losses().items()}, None
        loss, predictions, targets = self.evaluate(models["model"], batch)
        return {"model": loss}, (predictions, targets)


def samples(batch: Batch) -> int:
    """Number of samples of a collated batch: the first dimension of its first tensor."""
    while not hasattr(batch, "shape"):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return int(batch.shape[0])
