"""What recipes that classify the images of `data.*` have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from recipes.parts.classification import Classification
from recipes.parts.data import Splits
from recipes.parts.images import Images
from recipes.parts.optim import Optim, decay_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(kw_only=True)
class ImageClassification(Classification):
    """`data.*` are labeled images, `optim.*` an optimizer that does not decay biases and norms."""

    channels_last: ClassVar[bool] = True

    data: Images = field(default_factory=Images)
    optim: Optim = field(default_factory=Optim)

    def num_classes(self) -> int:
        """As many as the data has."""
        return self.data.num_classes()

    def build_data(self) -> Splits:
        """As `data.*` says."""
        return self.data.build()

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Weight decay on weights, not on biases and the gains of norms."""
        return self.optim.build(decay_groups(model))
