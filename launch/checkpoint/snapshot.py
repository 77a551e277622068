"""The state of a rank, copied into host memory: the only part of a save that the training waits for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from launch.checkpoint.tensor_file import StoredTensor, TensorSpec, dtype_name, file_header, torch_dtype
from strategies.sharded_state import TensorSlice


def specs_of(slices: Mapping[str, TensorSlice]) -> dict[str, TensorSpec]:
    """dtype and shape of what a file of `slices` holds."""
    return {name: (dtype_name(part.values.dtype), tuple(part.values.shape)) for name, part in slices.items()}


class Snapshot:
    """One buffer in host memory, laid out as the file will be.

    A tensor is copied once, and written and hashed from where that copy is. The buffer is pinned if the state
    is on a GPU, and kept for the next save.
    """

    def __init__(self, device: str) -> None:
        self.pinned = device != "cpu"
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.specs: dict[str, TensorSpec] = {}
        self.slices: dict[str, TensorSlice] = {}
        self.header = b""
        self.stored: dict[str, StoredTensor] = {}
        self.size = 0
        """bytes of all tensors"""
        self.copied: torch.cuda.Event | None = None

    def reserve(self, specs: Mapping[str, TensorSpec]) -> None:
        """Allocate the buffer for tensors of `specs`, and touch its pages.

        The first copy would otherwise take ten times as long.
        """
        if specs == self.specs:  # the same at each save, as a rule
            return
        self.specs, self.slices = dict(specs), {}
        self.header, self.stored, self.size = file_header(specs)
        if self.size > len(self.buffer):
            self.buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.buffer = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned).fill_(1)

    def copy(self, slices: Mapping[str, TensorSlice]) -> None:
        """Copy `slices` into the buffer.

        From a GPU the copies are only queued: before the next step, which must not change what they read.
        """
        self.reserve(specs_of(slices))
        for name, part in slices.items():
            copy = self.view(name)
            copy.copy_(part.values, non_blocking=True)
            self.slices[name] = part._replace(values=copy)  # not the live tensor: it would be kept alive
        if self.pinned:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def view(self, name: str) -> Tensor:
        """The part of the buffer that holds a tensor, 1-D."""
        stored = self.stored[name]
        return self.buffer[stored.offset : stored.offset + stored.nbytes].view(torch_dtype(stored.dtype))

    def file_content(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file; waits until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()
        yield self.header
        yield self.buffer[: self.size].numpy().data

    def table(self) -> dict[str, list[object]]:
        """What the manifest records of each tensor: [dtype, shape of the full tensor, position of the first
        element in it, number of elements, byte offset in the file].
        """
        return {
            name: [
                stored.dtype,
                self.slices[name].shape,
                self.slices[name].start,
                stored.numel,
                len(self.header) + stored.offset,
            ]
            for name, stored in self.stored.items()
        }
