"""The textbooks' convolutional network for handwritten digits: two blocks and two linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.parts.image_classification import ImageClassification
from recipes.parts.optim import Optim
from recipes.parts.option_types import Fraction, PositiveInt
from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class Model:
    """`model.*`"""

    channels: PositiveInt = 32
    """channels of the first block; the second has twice as many"""
    hidden: PositiveInt = 128
    """size of the linear layer between"""
    dropout: Fraction = 0.2
    """fraction of activations dropped before each linear layer in training"""


@dataclass(kw_only=True)
class MNIST(ImageClassification):
    """Digits with AdamW and one cycle; the training images are rotated and moved a little."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "micro_batch_size": 16, "epochs": 20}

    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=3e-3, weight_decay=0.01))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="onecycle"))

    def check(self) -> None:
        """Raise ValueError for images that are too small."""
        if self.data.pixels < 4:
            raise ValueError(f"data.image_size={self.data.pixels}: two poolings need at least 4 pixels")

    def build_model(self) -> nn.Module:
        """Convolution, BatchNorm, ReLU and pooling, twice; then dropout and a linear layer, twice."""
        from torch import nn

        width, pixels = self.model.channels, self.data.pixels // 4

        def block(inputs: int, outputs: int) -> nn.Sequential:
            # no bias: BatchNorm subtracts it again
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

        model = nn.Sequential(
            block(self.data.channels, width),
            block(width, 2 * width),
            nn.Flatten(),
            nn.Dropout(self.model.dropout),
            nn.Linear(2 * width * pixels**2, self.model.hidden),
            nn.ReLU(),
            nn.Dropout(self.model.dropout),
            nn.Linear(self.model.hidden, self.num_classes()),
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # He et al. 2015; no ReLU follows the last layer
                nn.init.kaiming_normal_(
                    module.weight, nonlinearity="linear" if module is model[-1] else "relu"
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The two convolutional blocks."""
        return list(model.children())[:2]
