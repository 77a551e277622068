"""safetensors files, written from one buffer and read by ranges of flattened tensors. Imports no torch by
itself.

The format (https://huggingface.co/docs/safetensors): 8 bytes length of the header, a JSON header, then the
tensors without gaps. The safetensors package reads and writes whole tensors, each through a copy of its own;
a save must copy once, and a rank must be able to read a part of a tensor straight into its memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from launch.runtime.files import RandomAccessFile

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {
    **{"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
"""bytes of an element, by the name that safetensors has for its type"""
HEADER_LIMIT = 2**30
"""bytes; a longer header is no header"""


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the data (`layout`) or of the file (`TensorFile`)"""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numel * SIZES[self.dtype]


Kind = tuple[str, tuple[int, ...]]
"""dtype and shape of a tensor, as a safetensors file names them"""


def layout(
    tensors: Mapping[str, Kind], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Stored], int]:
    """The beginning of a file that holds `tensors`, where each lies in the data, and the size of the data.

    Wide types first, so that each tensor is aligned to its own.
    """
    placed: dict[str, Stored] = {}
    size = 0
    for name in sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name)):
        placed[name] = Stored(*tensors[name], size)
        size += placed[name].size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.offset, t.offset + t.size]}
        for name, t in placed.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, placed, size


class TensorFile:
    """An open safetensors file. `tensors` says what is in it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or ValueError if it is no safetensors file."""
        self.file = RandomAccessFile(path)
        try:
            self.tensors = self._header()
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise ValueError(f"{path} is no safetensors file ({error})") from None

    def _header(self) -> dict[str, Stored]:
        start = bytearray(8)
        self.file.into(memoryview(start), 0)
        length, end = int.from_bytes(start, "little"), self.file.size
        if not 2 <= length <= min(HEADER_LIMIT, end - 8):
            raise ValueError("its header does not fit into it")
        text = bytearray(length)
        self.file.into(memoryview(text), 8)
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            if entry["dtype"] not in SIZES:
                raise ValueError(f"{name} has the unknown type {entry['dtype']}")
            first, last = entry["data_offsets"]
            found[name] = stored = Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if first < 0 or last - first != stored.size or 8 + length + last > end:
                raise ValueError(f"{name} does not lie in it")
        return found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `name`, 1-D, on the host, in memory of their own."""
        from launch.checkpoint.tensors import empty_tensor

        stored = self.tensors[name]
        assert 0 <= start <= stop <= stored.numel
        values, content = empty_tensor(stored.dtype, stop - start)
        self.file.into(content, stored.offset + start * SIZES[stored.dtype])
        return values

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
