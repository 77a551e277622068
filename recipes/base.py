"""The recipe contract: what is trained, declared. A recipe drives nothing and knows of no rank, device or
strategy.

A recipe is one dataclass. Its fields are its part of the command line: nested dataclasses `model`, `data`,
`optim` and `schedule` make the keys `model.*`, `data.*`, `optim.*` and `schedule.*`, and the docstring under
a field its line in `--help`. Modules of built-in recipes import torch inside their methods only, so that a
wrong key is answered before torch loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.parts.data import Batch, Splits, num_samples
from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torchmetrics import Metric

Losses = Mapping[str, "Callable[[dict[str, nn.Module], Batch], Tensor]"]


@dataclass(kw_only=True)
class Recipe:
    """Base of all recipes. Override `build_data`, `build_model`, `build_optimizer` and `loss`; the rest has
    defaults.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """this recipe's defaults for keys of the run: {"batch_size": 64, "micro_batch_size": 16, "epochs": 10}"""
    item_name: ClassVar[str] = "samples"
    """what the loss is summed over and throughput is reported in: `tokens` for a language model"""
    channels_last: ClassVar[bool] = False
    """copy images to the GPU in torch's channels_last memory format, which convolutions prefer"""
    monitor: ClassVar[str] = "loss"
    """the validation metric that early stopping, the best checkpoint and reduce-on-plateau watch"""
    monitor_mode: ClassVar[str] = "min"
    """`min` or `max`: which way the monitored metric is better"""
    skip_nonfinite: ClassVar[bool] = False
    """skip optimizer steps whose loss is NaN or infinite instead of ending the run; each step then waits for
    its loss
    """
    resume_may_change: ClassVar[tuple[str, ...]] = ("data.root", "data.path")
    """keys of this recipe that a resumed run may change: where the data is, not what it is"""

    schedule: Schedule = field(default_factory=Schedule)

    # required -----------------------------------------------------------------------------------------------

    def build_data(self) -> Splits:
        """The data sets; called once on every rank, so cheap. Raises FileNotFoundError or ValueError, shown
        in one line.
        """
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The model on the host, initialized from torch's default generator (seeded by the caller)."""
        raise NotImplementedError

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer, over `model.parameters()` or over groups with their own learning rates."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one micro-batch SUMMED over its items: a scalar. The loop divides by the number of
        items in the global batch.
        """
        raise NotImplementedError

    # optional -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for fields that cannot work together. Called before torch is
        imported, after types, ranges and each group of options (`OptionGroup.check`) have been checked.
        """

    def num_items(self, batch: Batch) -> int | Tensor | None:  # noqa: ARG002
        """How many items the loss of this micro-batch sums over (tokens that are not masked, say).

        None, for every batch alike: each sample has `items_per_sample()`, so the ranks need not add up their
        counts in each step.
        """
        return None

    def items_per_sample(self) -> int:
        """How many items the loss of each sample sums over, where all have as many: tokens of a full window.
        Not asked where `num_items` counts.
        """
        return 1

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:  # noqa: ARG002
        """The repeated layers of the model: what is sharded, recomputed and compiled as one."""
        return ()

    def eval_step(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """One validation batch, for recipes with `metrics`: (loss as in `loss`, predictions, targets); the
        last two go to each metric's `update`.
        """
        raise NotImplementedError

    def metrics(self) -> Mapping[str, Metric]:
        """Validation metrics by name. Without any, validation reports the loss alone and never calls
        `eval_step`.
        """
        return {}

    # several models -----------------------------------------------------------------------------------------

    def models(self) -> Mapping[str, Callable[[], nn.Module]]:
        """The models by name, as factories; default: one, called `model`."""
        return {"model": self.build_model}

    def optimizers(self) -> Mapping[str, Callable[[nn.Module], Optimizer]]:
        """The optimizer of each trained model, as factories. A model without one stays frozen (a teacher)."""
        return {"model": self.build_optimizer}

    def losses(self) -> Losses:
        """The loss that trains each model, in the order of a step; while one is trained the others are
        frozen.

        Each loss takes all models by name and a batch, and returns a sum like `loss`.
        """
        return {"model": lambda models, batch: self.loss(models["model"], batch)}

    def eval_step_models(
        self, models: dict[str, nn.Module], batch: Batch
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """One validation batch, for several models: (losses by name, (predictions, targets) for `metrics` or
        None).
        """
        if not self.metrics():
            return {name: loss(models, batch) for name, loss in self.losses().items()}, None
        loss, predictions, targets = self.eval_step(models["model"], batch)
        return {"model": loss}, (predictions, targets)


def local_num_items(recipe: Recipe, batch: Batch) -> int | Tensor:
    """How many items the loss of `batch` sums over, counted or known from its number of samples."""
    counted = recipe.num_items(batch)
    return num_samples(batch) * recipe.items_per_sample() if counted is None else counted
