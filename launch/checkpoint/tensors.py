"""torch's types by the names that safetensors has for them, and memory for those that are read from files."""

from __future__ import annotations

import torch
from torch import Tensor

from launch.checkpoint.tensor_file import SIZES

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == SIZES


def empty_tensor(dtype: str, numel: int) -> tuple[Tensor, memoryview]:
    """A tensor of `numel` elements, not yet written to, and its bytes: files are read straight into them."""
    values = torch.empty(numel, dtype=DTYPES[dtype])
    return values, values.view(torch.uint8).numpy().data
