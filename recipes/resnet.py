"""Residual networks (He et al. 2015): torchvision's, by depth, with a stem for small or large images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from recipes.parts.image_classification import ImageClassification
from recipes.parts.optim import Optim
from recipes.parts.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

SMALL = 64
"""images up to so many pixels get the small stem: the large one would leave them 2 x 2 after a few layers"""


@dataclass(kw_only=True)
class Model:
    """`model.*`"""

    depth: Literal[18, 34, 50, 101, 152] = 18
    """number of layers"""
    small_stem: bool | None = None
    """3 x 3 convolution and no pooling in front (default: for images of at most 64 pixels)"""
    zero_init_residual: bool = True
    """start each residual block as the identity (Goyal et al. 2017)"""


@dataclass(kw_only=True)
class ResNet(ImageClassification):
    """Image classification with SGD and a cosine."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "micro_batch_size": 16, "epochs": 10}

    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=lambda: Optim(lr=0.02, weight_decay=5e-4, nesterov=True))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="cosine", warmup=0.1))

    def build_model(self) -> nn.Module:
        """torchvision's ResNet, its first convolution fitted to the channels and the size of the images."""
        from torch import nn
        from torchvision import models

        build = getattr(models, f"resnet{self.model.depth}")
        model: nn.Module = build(
            num_classes=self.num_classes(), zero_init_residual=self.model.zero_init_residual
        )
        small = self.data.pixels <= SMALL if self.model.small_stem is None else self.model.small_stem
        if small or self.data.channels != 3:
            kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
            model.conv1 = nn.Conv2d(self.data.channels, 64, kernel, stride, padding, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if small:
            model.maxpool = nn.Identity()
        return model

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The residual blocks."""
        return [block for i in range(1, 5) for block in model.get_submodule(f"layer{i}").children()]
