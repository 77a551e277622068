"""The 2-norm of many tensors, exact enough to compare strategies by."""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 4096
"""elements that are summed up in fp32 before float64 takes over"""


def squared_norm(tensors: list[Tensor], device: str) -> Tensor:
    """Sum of the squares of all elements: a float64 scalar on `device`.

    On a CPU torch adds up a whole tensor in fp32, and so little by little loses the small against the large: 4.5e-5 of the
    norm of 2.4 million elements, and not the same for a shard of them. Rows cost nothing and leave 1e-8. A GPU adds in
    blocks anyway.
    """
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel() > ROW:
            flat = tensor.reshape(-1)
            end = flat.numel() // ROW * ROW
            parts += [torch.linalg.vector_norm(flat[:end].view(-1, ROW), dim=1), flat[end:]]
        else:
            parts.append(tensor)
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(parts, 2)).to(device)
    norm: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return norm.square()
