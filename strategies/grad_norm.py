"""The 2-norm of many tensors, exact enough to compare strategies by."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**14
"""elements that are summed up in float64 as they are: it takes less time than to cut them up"""
ROW = 2**12
"""elements of a larger tensor that are summed up in fp32 before float64 takes over"""


def squared_norm(tensors: list[Tensor], device: str) -> Tensor:
    """Sum of the squares of all elements: a float64 scalar on `device`. The tensors lie on one device, not
    always on that.

    On a CPU torch adds up a whole tensor in fp32, and so little by little loses the small against the large:
    4.5e-5 of the norm of 2.4 million elements, and not the same for a shard of them. Rows cost nothing and
    leave 1e-8. A GPU adds in blocks anyway.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if tensors[0].device.type == "cpu":
        reals = [real(tensor) for tensor in tensors]
        parts = [part for tensor in reals for part in ([tensor] if tensor.numel() <= SMALL else rows(tensor))]
        norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
    else:
        norms = torch._foreach_norm(tensors, 2)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms).to(device), dtype=torch.float64)
    return norm.square()


def real(tensor: Tensor) -> Tensor:
    """Its elements as real numbers: those of a complex one by parts, of a sparse one without the zeros."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def rows(tensor: Tensor) -> list[Tensor]:
    """The norms of the rows into which `tensor` is cut, and the elements that are left."""
    flat = tensor.reshape(-1)
    end = flat.numel() // ROW * ROW
    norms = torch.linalg.vector_norm(
        flat[:end].view(-1, ROW), dim=1, dtype=torch.promote_types(flat.dtype, torch.float32)
    )
    return [norms, flat[end:]]
