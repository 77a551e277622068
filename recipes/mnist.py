"""The textbooks' convolutional network for handwritten digits: two blocks and two linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.parts.classification import Classification
from recipes.parts.data import Splits
from recipes.parts.images import Images
from recipes.parts.optim import Optim, decay_groups
from recipes.parts.options import PositiveInt, Share
from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(kw_only=True)
class Model:
    """`model.*`"""

    channels: PositiveInt = 32
    """channels of the first block; the second has twice as many"""
    hidden: PositiveInt = 128
    """size of the linear layer between"""
    dropout: Share = 0.2
    """share of activations dropped before each linear layer in training"""


@dataclass(kw_only=True)
class MNIST(Classification):
    """Digits with AdamW and one cycle; the training images are rotated and moved a little."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "micro_batch_size": 16, "epochs": 20}
    channels_last: ClassVar[bool] = True

    model: Model = field(default_factory=Model)
    data: Images = field(default_factory=Images)
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=3e-3, weight_decay=0.01))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="onecycle"))

    def check(self) -> None:
        """Raise ValueError for images that are too small."""
        if self.data.pixels < 4:
            raise ValueError(f"data.image_size={self.data.pixels}: two poolings need at least 4 pixels")

    def num_classes(self) -> int:
        """As many as the data has."""
        return self.data.num_classes()

    def build_data(self) -> Splits:
        """As `data.*` says."""
        return self.data.build()

    def build_model(self) -> nn.Module:
        """Convolution, BatchNorm, ReLU and pooling, twice; then two linear layers with dropout before each."""
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

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Weight decay on weights, not on biases and BatchNorm."""
        return self.optim.build(decay_groups(model))

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The two convolutional blocks."""
        return list(model.children())[:2]
