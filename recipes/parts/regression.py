"""What recipes that predict a number have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.base import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchmetrics import Metric


@dataclass(kw_only=True)
class Regression(Recipe):
    """Samples are (input, target); the model's output has the target's shape."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Squared error, summed over samples."""
        return self.eval_step(model, batch)[0]

    def eval_step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, predictions, targets), the last two flat."""
        inputs, targets = batch
        outputs = model(inputs)
        squared: Tensor = (outputs - targets).square()
        return squared.sum(), outputs.flatten(), targets.flatten()

    def metrics(self) -> Mapping[str, Metric]:
        """Mean squared error, mean absolute error and the coefficient of determination."""
        from torchmetrics import regression

        return {
            "mse": regression.MeanSquaredError(),
            "mae": regression.MeanAbsoluteError(),
            "r2": regression.R2Score(),
        }
