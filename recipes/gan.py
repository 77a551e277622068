"""A generative adversarial network (Goodfellow et al. 2014) on digits: two models, optimizers and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.base import Losses, Recipe
from recipes.parts.data import Splits
from recipes.parts.images import Images
from recipes.parts.optim import Optim
from recipes.parts.option_types import Fraction, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(kw_only=True)
class Model:
    """`model.*`"""

    latent: PositiveInt = 32
    """size of the noise that the generator makes an image of"""
    width: PositiveInt = 32
    """channels of both networks at half the resolution; twice as many at a quarter"""
    dropout: Fraction = 0.5
    """fraction of the discriminator's activations dropped in training: it memorizes less, the generator
    varies more
    """


@dataclass(kw_only=True)
class GAN(Recipe):
    """Non-saturating losses; both networks by Adam with little momentum (Radford et al. 2015)."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "micro_batch_size": 16, "epochs": 30}

    model: Model = field(default_factory=Model)
    data: Images = field(default_factory=lambda: Images(augment=False, normalize="signed"))
    optim: Optim = field(default_factory=lambda: Optim(name="adam", lr=1e-3, betas=(0.5, 0.999)))

    def check(self) -> None:
        """Raise ValueError for images that cannot be halved twice."""
        if self.data.pixels % 4:
            raise ValueError(
                f"data.image_size={self.data.pixels}: the generator doubles twice, give a multiple of 4"
            )

    def build_data(self) -> Splits:
        """As `data.*` says; the classes go unused."""
        return self.data.build()

    def build_generator(self) -> nn.Module:
        """Noise [batch, latent] to images [batch, channels, pixels, pixels] in the range of the data."""
        from torch import nn

        width, pixels = self.model.width, self.data.pixels // 4
        return nn.Sequential(
            nn.Linear(self.model.latent, 2 * width * pixels**2, bias=False),
            nn.Unflatten(1, (2 * width, pixels, pixels)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, self.data.channels, 4, stride=2, padding=1),
            nn.Tanh() if self.data.normalize == "signed" else nn.Identity(),
        )

    def build_discriminator(self) -> nn.Module:
        """Images to the logit of being real. No BatchNorm: it would tell a batch apart, not an image."""
        from torch import nn

        width, pixels = self.model.width, self.data.pixels // 4
        return nn.Sequential(
            nn.Conv2d(self.data.channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(self.model.dropout),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(self.model.dropout),
            nn.Flatten(),
            nn.Linear(2 * width * pixels**2, 1),
        )

    def models(self) -> Mapping[str, Callable[[], nn.Module]]:
        """The discriminator and the generator."""
        return {"discriminator": self.build_discriminator, "generator": self.build_generator}

    def optimizers(self) -> Mapping[str, Callable[[nn.Module], Optimizer]]:
        """One each, alike."""
        return {name: lambda model: self.optim.build(model.parameters()) for name in self.models()}

    def losses(self) -> Losses:
        """The discriminator's, then the generator's."""
        return {"discriminator": self.discriminator_loss, "generator": self.generator_loss}

    def discriminator_loss(self, models: dict[str, nn.Module], batch: Any) -> Tensor:
        """-log D(x) - log(1 - D(G(z))), summed over samples."""
        import torch
        from torch.nn import functional as F

        real = batch[0]
        with torch.no_grad():
            fake = models["generator"](self.noise(real))
        # one call for both: data-parallel wrappers expect one forward before a backward
        logits = models["discriminator"](torch.cat([real, fake.to(real.dtype)]))
        truth = torch.cat([torch.ones(len(real)), torch.zeros(len(real))]).to(logits)
        return F.binary_cross_entropy_with_logits(logits.flatten(), truth, reduction="sum")

    def generator_loss(self, models: dict[str, nn.Module], batch: Any) -> Tensor:
        """-log D(G(z)), the non-saturating loss of the paper's section 3, summed over samples."""
        import torch
        from torch.nn import functional as F

        logits = models["discriminator"](models["generator"](self.noise(batch[0]))).flatten()
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum")

    def noise(self, real: Tensor) -> Tensor:
        """z [batch, latent], drawn from the default generator of the batch's device."""
        import torch

        return torch.randn(len(real), self.model.latent, device=real.device)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The convolutions of either network."""
        from torch import nn

        return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
