"""Data sets of labeled images: bytes in memory, and synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING

from recipes.parts.permutation import mix

if TYPE_CHECKING:
    from torch import Tensor

    Augment = Callable[[Tensor, Tensor], Tensor]
    """of images [n, channels, height, width] and a seed for each, int64 [n]"""


class InMemoryImages:
    """Images held as bytes, [N, channels, height, width], and made floats a batch at a time."""

    def __init__(
        self,
        images: Tensor,
        classes: Tensor,
        pixels: int,
        mean_std: tuple[Sequence[float], Sequence[float]],
        augment: Augment | None,
    ) -> None:
        import torch

        self.images, self.classes, self.pixels, self.augment = images, classes, pixels, augment
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in mean_std)
        # (x / 255 - mean) / std in one multiplication and one addition
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        import torch

        images, classes = self.batch(torch.tensor([index]), lambda: torch.randint(2**62, (1,)))
        return images[0], int(classes)

    @property
    def nbytes(self) -> int:
        """Of the images; the classes are little beside them."""
        return self.images.nbytes

    def to(self, device: str) -> InMemoryImages:
        """The same images in the memory of `device`."""
        moved = copy(self)
        for name in ("images", "classes", "scale", "shift"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def batch(self, indices: Tensor, seeds: Callable[[], Tensor]) -> list[Tensor]:
        """Images [n, channels, height, width] and classes [n]."""
        from torch.nn import functional as F

        indices = indices.to(self.images.device)
        images = self.images[indices].float()
        if images.shape[-1] != self.pixels:
            size = (self.pixels, self.pixels)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.augment is not None:
            images = self.augment(images, seeds())
        return [images * self.scale + self.shift, self.classes[indices]]


class SyntheticImages:
    """Noise over a coarse pattern of its class: learnable, and a function of the index, so that a million
    costs nothing.
    """

    def __init__(self, size: int, classes: int, shape: tuple[int, int, int]) -> None:
        """`size` images of `shape` (channels, height, width)."""
        import torch

        self.size, self.classes, self.shape = size, classes, shape
        generator = torch.Generator().manual_seed(0)
        self.patterns = torch.randn(classes, shape[0], 4, 4, generator=generator)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        import torch
        from torch.nn import functional as F

        if not 0 <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(mix(index + 1)))
        label = mix(index + 1) % self.classes
        return noise + F.interpolate(self.patterns[label, None], self.shape[1:])[0], label
