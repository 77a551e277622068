"""The recipe contract: what is trained, declared. A recipe drives nothing and knows of no rank, device or
strategy.

A recipe is one dataclass. Its fields are its part of the command line: nested dataclasses `model`, `data`,
`optim` and
`schedule` make the keys `model.*`, `data.*`, `optim.*` and `schedule.*`, and the docstring under a field its
line in `--help`. Modules of built-in recipes import torch inside their methods only, so that a wrong key is
answered before torch loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.parts.data import Batch, Splits, samples
from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torchmetrics import Metric

Losses = Mapping[str, "Callable[[dict[str, nn.Module], Batch], Tensor]"]


@dataclass(kw_only=True)
class Recipe:
    """Base of all recipes: override `build_model`, `build_optimizer`, `build_data` and `loss`; the rest has a
    meaning.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """this recipe's defaults for keys of the run, e.g. {"batch_size": 64, "micro_batch_size": 16, "epochs":
    10}
    """
    unit: ClassVar[str] = "samples"
    """what `num_items` counts; a run's speed is told in it (`tokens`)"""
    channels_last: ClassVar[bool] = False
    """give images to the GPU with the channels of a pixel side by side, as its convolutions like it"""
    monitor: ClassVar[str] = "loss"
    """the evaluation metric that early stopping and reduce-on-plateau watch"""
    monitor_mode: ClassVar[str] = "min"
    """`min` or `max`: which way the objective is better"""
    skip_nonfinite: ClassVar[bool] = False
    """leave out steps whose loss is NaN or infinite instead of stopping the run (costs a device
    synchronisation a step)
    """
    resume_may_change: ClassVar[tuple[str, ...]] = ("data.root", "data.path")
    """keys of this recipe that a resumed run may change: where the data lies, not what it is"""

    schedule: Schedule = field(default_factory=Schedule)

    # what every recipe says ---------------------------------------------------------------------------------

    def build_data(self) -> Splits:
        """The data sets, each cheap to build on every rank. Raises FileNotFoundError or ValueError for the
        user to read.
        """
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The model on the host, initialised from torch's default generator (seeded by the caller)."""
        raise NotImplementedError

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer, over `model.parameters()` or over groups with their own learning rates."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss SUMMED over what `num_items` counts: a scalar. The engine divides once, by the count of
        the global batch.
        """
        raise NotImplementedError

    # what a recipe may say ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for fields that cannot work together. Called before torch is
        imported.
        """

    def num_items(self, batch: Batch) -> int | Tensor:
        """What the loss of `batch` sums over; default: its samples, times `items_per_sample`.

        A recipe with masked tokens counts the others. The ranks then have to ask each other in each step.
        """
        return samples(batch) * self.items_per_sample()

    def items_per_sample(self) -> int:
        """What the loss of any one sample sums over; default: one. For a language model on full windows their
        tokens.
        """
        return 1

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:  # noqa: ARG002
        """The repeated parts of the model: the unit of activation checkpointing, compilation and sharding."""
        return ()

    def eval_step(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For recipes with metrics: (loss as in `loss`, predictions, targets), the last two for each metric's
        `update`.
        """
        raise NotImplementedError

    def metrics(self) -> Mapping[str, Metric]:
        """Evaluation metrics by name. Without any, evaluation reports the loss alone and never calls
        `eval_step`.
        """
        return {}

    # several models -----------------------------------------------------------------------------------------

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

    def eval_step_models(
        self, models: dict[str, nn.Module], batch: Batch
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Evaluation of one batch: the losses by name, and (predictions, targets) if there are metrics."""
        if not self.metrics():
            return {name: loss(models, batch) for name, loss in self.losses().items()}, None
        loss, predictions, targets = self.eval_step(models["model"], batch)
        return {"model": loss}, (predictions, targets)
