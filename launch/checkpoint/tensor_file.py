"""safetensors files: their header, and flattened ranges of their tensors read into given memory.

The format (https://huggingface.co/docs/safetensors): 8 bytes length of the header, a JSON header, then the
tensors without gaps. The safetensors package reads whole tensors and slices along their dimensions
(`safe_open(...).get_slice(...)`). A rank's part of a state is something else: a range of the flattened n-d
tensor, that is to go straight into memory that exists already; and a save writes its file from one buffer,
without a second copy. Those two are what this file adds.

Imports torch in `torch_dtype` and `empty_tensor` only.
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
    import torch
    from torch import Tensor

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
"""torch's name of a dtype, by the one that safetensors has for it"""
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}
"""bytes of an element, by the dtype's name in safetensors"""
HEADER_LIMIT = 2**30
"""bytes; a longer header is no header"""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the data (`file_header`) or of the file (`TensorFile`)"""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * ITEM_SIZES[self.dtype]


TensorSpec = tuple[str, tuple[int, ...]]
"""dtype (as safetensors names it) and shape of a tensor"""


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises KeyError if it has none."""
    return SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def empty_tensor(dtype: str, numel: int) -> tuple[Tensor, memoryview]:
    """An uninitialized 1-D tensor of `numel` elements, and its bytes: files are read straight into them."""
    import torch

    tensor = torch.empty(numel, dtype=torch_dtype(dtype))
    return tensor, tensor.view(torch.uint8).numpy().data


def file_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """The header of a file that holds tensors of `specs`, where each of them lies, and the bytes of all.

    Wide dtypes first, so that each tensor is aligned to its own.
    """
    stored: dict[str, StoredTensor] = {}
    size = 0
    for name in sorted(specs, key=lambda name: (-ITEM_SIZES[specs[name][0]], name)):
        stored[name] = StoredTensor(*specs[name], size)
        size += stored[name].nbytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in stored.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, stored, size


class TensorFile:
    """An open safetensors file; `tensors` says what is in it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or ValueError if it is no safetensors file."""
        self.file = RandomAccessFile(path)
        try:
            self.tensors = self._read_header()
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise ValueError(f"{path} is no safetensors file ({error})") from None

    def _read_header(self) -> dict[str, StoredTensor]:
        start = bytearray(8)
        self.file.into(memoryview(start), 0)
        length, end = int.from_bytes(start, "little"), self.file.size
        if not 2 <= length <= min(HEADER_LIMIT, end - 8):
            raise ValueError("its header does not fit into it")
        text = bytearray(length)
        self.file.into(memoryview(text), 8)
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in ITEM_SIZES:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            first, last = entry["data_offsets"]
            tensors[name] = tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if first < 0 or last - first != tensor.nbytes or 8 + length + last > end:
                raise ValueError(f"{name} does not lie in it")
        return tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `name`, 1-D, on the host, in memory of their own."""
        stored = self.tensors[name]
        assert 0 <= start <= stop <= stored.numel
        tensor, content = empty_tensor(stored.dtype, stop - start)
        self.file.into(content, stored.offset + start * ITEM_SIZES[stored.dtype])
        return tensor

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
