"""The tensors in a batch: walk over them, pin them, move them to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recipes.parts.data import Batch


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(part, change) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [map_tensors(part, change) for part in batch]
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch, or in a model's output of any form."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(part)


def pin_memory(batch: Batch, device: str) -> Batch:
    """The batch in pinned memory, from which copies to `device` do not block."""
    if device == "cpu":
        return batch
    return map_tensors(batch, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())


def to_device(batch: Batch, device: str, channels_last: bool = False) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory do not block. With `channels_last`,
    images for a GPU in that memory format.

    The activations follow the images. Weights in that format would not do: FSDP2 refuses them, and ZeRO
    flattens them.
    """
    moved = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return map_tensors(moved, to_channels_last) if channels_last and device != "cpu" else moved


def to_channels_last(tensor: Tensor) -> Tensor:
    """Images, float [n, channels, height, width], with the channels of a pixel side by side in memory; others
    as they are.
    """
    if tensor.ndim != 4 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
