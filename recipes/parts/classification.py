"""What recipes that classify have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.base import Recipe
from recipes.parts.option_types import Fraction

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchmetrics import Metric


@dataclass(kw_only=True)
class Classification(Recipe):
    """Samples are (input, class); the model gives one logit a class: [batch, classes]."""

    monitor: ClassVar[str] = "accuracy"
    monitor_mode: ClassVar[str] = "max"

    label_smoothing: Fraction = 0.0
    """fraction of the target spread over all classes, in training only"""

    def num_classes(self) -> int:
        """Number of classes, known without building anything."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy, summed over samples."""
        return self.eval_step(model, batch)[0]

    def eval_step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits [batch, classes], classes [batch])."""
        from torch.nn import functional as F

        inputs, classes = batch
        logits = model(inputs)
        smoothing = self.label_smoothing if model.training else 0.0
        return F.cross_entropy(logits, classes, reduction="sum", label_smoothing=smoothing), logits, classes

    def metrics(self) -> Mapping[str, Metric]:
        """Accuracy over samples, F1 averaged over classes, and the confusion matrix [true, predicted]."""
        from torchmetrics import classification

        classes = self.num_classes()
        return {
            "accuracy": classification.MulticlassAccuracy(classes, average="micro"),
            "f1": classification.MulticlassF1Score(classes, average="macro"),
            "confusion": classification.MulticlassConfusionMatrix(classes),
        }
