"""The state of a rank, copied into host memory: the only part of a save that the training waits for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from launch.checkpoint.tensor_file import Kind, Stored, layout
from launch.checkpoint.tensors import DTYPES, NAMES
from strategies.sharded_state import TensorSlice


def kinds(ranges: Mapping[str, TensorSlice]) -> dict[str, Kind]:
    """What a file of `ranges` holds."""
    return {name: (NAMES[part.values.dtype], tuple(part.values.shape)) for name, part in ranges.items()}


class Snapshot:
    """One buffer, laid out as the file will be: a tensor is copied once, and written and hashed from where it
    lies then.

    The buffer is pinned if the state is on a GPU, and kept for the next save.
    """

    def __init__(self, device: str) -> None:
        self.pinned = device != "cpu"
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.tensors: dict[str, Kind] = {}
        self.ranges: dict[str, TensorSlice] = {}
        self.header = b""
        self.placed: dict[str, Stored] = {}
        self.size = 0
        self.copied: torch.cuda.Event | None = None

    def reserve(self, tensors: Mapping[str, Kind]) -> None:
        """Lay the buffer out for `tensors`, and touch its pages: a first copy would be ten times slower for
        it.
        """
        if tensors == self.tensors:  # the same at each save, as a rule
            return
        self.tensors, self.ranges = dict(tensors), {}
        self.header, self.placed, self.size = layout(tensors)
        if self.size > len(self.buffer):
            self.buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.buffer = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned).fill_(1)

    def take(self, ranges: Mapping[str, TensorSlice]) -> None:
        """Copy `ranges`. From a GPU the copies are only queued: ahead of the next step, which must not change
        what they read.
        """
        self.reserve(kinds(ranges))
        for name, part in ranges.items():
            copy = self.of(name)
            copy.copy_(part.values, non_blocking=True)
            self.ranges[name] = part._replace(values=copy)  # not the live tensor: it would be kept alive
        if self.pinned:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def of(self, name: str) -> Tensor:
        """The place of a tensor in the buffer."""
        stored = self.placed[name]
        return self.buffer[stored.offset : stored.offset + stored.size].view(DTYPES[stored.dtype])

    def content(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file, once the copies are made."""
        if self.copied is not None:
            self.copied.synchronize()
        yield self.header
        yield self.buffer[: self.size].numpy().data

    def table(self) -> dict[str, list[object]]:
        """What the manifest has to know of each tensor: [dtype, shape of the whole, first element, elements,
        byte offset].
        """
        return {
            name: [
                stored.dtype,
                self.ranges[name].shape,
                self.ranges[name].start,
                stored.numel,
                len(self.header) + stored.offset,
            ]
            for name, stored in self.placed.items()
        }
