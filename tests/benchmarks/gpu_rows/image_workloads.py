"""Image classification on one GPU: ResNet-50 and ViT-S."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.resnet import Bottleneck

from recipes.parts.optim import decay_groups
from tests.benchmarks.gpu_rows.gpu_workloads import GpuWorkload, SummedCrossEntropy


class Classifier(nn.Module):
    """Pictures, uint8 [batch, 3, height, width], and their classes to the summed loss."""

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.network, self.loss = network, SummedCrossEntropy()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.layout)

    def forward(self, pictures: Tensor, classes: Tensor) -> Tensor:
        """The loss."""
        normal = (
            pictures.to(memory_format=self.layout).float() - 127.5
        ) / 73.6  # of bytes that are all as likely
        loss: Tensor = self.loss(self.network(normal), classes)
        return loss


@dataclass(kw_only=True)
class Pictures(GpuWorkload):
    """Classes of pictures."""

    item_name: ClassVar[str] = "images"

    pixels: int = 224
    classes: int = 1000
    nhwc: bool = False
    """`channels_last`: the channels of a pixel side by side, in the pictures and in the weights"""
    toy: bool = False
    """a small network of the same kind"""

    def architecture(self) -> tuple[Any, ...]:
        """The rest is how it is trained."""
        return self.pixels, self.classes, self.nhwc, self.toy

    def rows(self) -> tuple[Tensor, Tensor]:
        """Any bytes."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.samples, 3, self.pixels, self.pixels)
        pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return pictures, torch.randint(self.classes, (self.samples,), generator=generator)

    def build_model(self) -> nn.Module:
        """The network with its loss."""
        return Classifier(self.network(), self.nhwc)

    def network(self) -> nn.Module:
        """Pictures to logits."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ResNet50(Pictures):
    """He et al. 2015."""

    def network(self) -> nn.Module:
        """torchvision's."""
        network = torchvision.models.ResNet(
            Bottleneck, [1, 1, 1, 1] if self.toy else [3, 4, 6, 3], num_classes=self.classes
        )
        if self.toy:
            network.layer3, network.layer4, network.fc = (
                nn.Identity(),
                nn.Identity(),
                nn.Linear(512, self.classes),
            )
        return network  # type: ignore[no-any-return]  # torchvision is not typed

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum, slow enough for losses to stay comparable."""
        return torch.optim.SGD(
            decay_groups(model), lr=1e-4, momentum=0.9, weight_decay=5e-5, fused=True if self.fused else None
        )


@dataclass(kw_only=True)
class ViTS(Pictures):
    """Dosovitskiy et al. 2021, in the small size of Touvron et al. 2021."""

    def network(self) -> nn.Module:
        """torchvision's."""
        shape = {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
        if self.toy:
            shape = {"num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}
        build = torchvision.models.VisionTransformer
        network: nn.Module = build(image_size=self.pixels, patch_size=16, num_classes=self.classes, **shape)
        return network

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The encoder blocks and the loss."""
        return [*model.get_submodule("network.encoder.layers").children(), model.get_submodule("loss")]
