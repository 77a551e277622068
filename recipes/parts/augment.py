"""Augmentation of whole batches of images, each by draws of its own: a function of the samples' seeds, on any
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def uniform(seeds: Tensor, draws: int) -> Tensor:
    """`draws` numbers from 0 to below 1 for each seed: int64 [n] to float32 [n, draws].

    The finalizer of splitmix64 (Steele, Lea and Flood 2014) in signed integers, which wrap around; `>>` drags
    the sign along.
    """
    import torch

    def shifted(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    value = seeds[:, None] + torch.arange(1, draws + 1, device=seeds.device) * -0x61C8864680B583EB
    value = (value ^ shifted(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ shifted(value, 27)) * -0x6B2FB644ECCEEE15
    value = value ^ shifted(value, 31)
    return shifted(value, 40).float() / 2**24


def random_affine(images: Tensor, seeds: Tensor, degrees: float, translate: float) -> Tensor:
    """Rotate each of `images` [n, c, h, w] by up to `degrees` and translate it by up to `translate` of its
    size, at random; what is uncovered is 0.
    """
    import torch
    from torch.nn import functional as F

    draws = uniform(seeds.to(images.device), 3) * 2 - 1
    angle = draws[:, 0] * (degrees * torch.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    down, right = (2 * translate * draws[:, 1:]).unbind(1)  # the grid goes from -1 to 1
    rows = [torch.stack(row, 1) for row in ((cosine, -sine, right), (sine, cosine, down))]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def random_crop_and_flip(images: Tensor, seeds: Tensor, padding: int) -> Tensor:
    """Crop each of `images` [n, c, h, w], padded by `padding` zeros on each side, to its size at a random
    place, and flip it horizontally with probability 1/2.
    """
    import torch
    from torch.nn import functional as F

    count, channels, height, width = images.shape
    draws = uniform(seeds.to(images.device), 3)
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return F.pad(images, [padding] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
