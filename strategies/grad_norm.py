"""The gradient norm: the 2-norm of many tensors (for `clip_norm`), exact enough to compare strategies by."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.torch_compat import foreach_norm

SMALL = 2**14
"""elements that are summed in float64 as they are: that takes less time than to split them into rows"""
ROW = 2**12
"""elements of a larger tensor that are summed in fp32 before float64 takes over"""


def squared_norm(tensors: list[Tensor], device: str) -> Tensor:
    """Sum of the squares of all elements: a float64 scalar on `device`. Not collective.

    The tensors lie on one device, not necessarily that one. On a CPU torch sums a whole tensor in fp32, and
    so loses the small against the large: 4.5e-5 of the norm of 2.4 million elements, and not the same for a
    shard of them. Rows cost nothing and leave 1e-8. A GPU sums in blocks anyway.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if tensors[0].device.type == "cpu":
        parts: list[Tensor] = []
        for tensor in map(as_real, tensors):
            parts += [tensor] if tensor.numel() <= SMALL else row_norms(tensor)
        norms = foreach_norm(parts, torch.float64)
    else:
        norms = foreach_norm(tensors)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms).to(device), dtype=torch.float64)
    return norm.square()


def as_real(tensor: Tensor) -> Tensor:
    """The elements as real numbers: of a complex tensor both parts, of a sparse one without the zeros."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def row_norms(tensor: Tensor) -> list[Tensor]:
    """The norms of rows of ROW elements into which `tensor` is split, and the elements that are left."""
    flat = tensor.reshape(-1)
    end = flat.numel() // ROW * ROW
    dtype = torch.promote_types(flat.dtype, torch.float32)
    return [torch.linalg.vector_norm(flat[:end].view(-1, ROW), dim=1, dtype=dtype), flat[end:]]
