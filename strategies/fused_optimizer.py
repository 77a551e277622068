"""The fused optimizer (`fused=True`): one kernel updates all parameters, if the recipe leaves that open."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""those whose fused update exists on a CPU as on a GPU, in all versions of torch that we support"""


def use_fused_update(optimizer: Optimizer, module: nn.Module) -> bool:
    """Let `optimizer` update in one kernel, if it can. Returns whether it does; call it before the first
    step.

    By default torch takes several kernels for many tensors (`foreach`) on a GPU, and one by one on a CPU: its
    documentation calls the fused update the fastest, and keeps it from being the default until it has been in
    use for longer (https://docs.pytorch.org/docs/stable/optim.html). A recipe that sets `fused` or `foreach`
    itself is left alone.
    """
    groups = optimizer.param_groups
    left_open = all(group.get(key) is None for group in groups for key in ("fused", "foreach"))
    differentiable = any(group.get("differentiable") for group in groups)
    sparse_gradients = any(getattr(part, "sparse", False) for part in module.modules())  # embeddings
    parameters = [parameter for group in groups for parameter in group["params"]]
    supported = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    # "Operator aten._fused_sgd_.default does not have a sharding strategy registered" (torch 2.14). Only a
    # DTensor has a mesh; importing its class for the question would make each start half a second longer.
    sharded = any(hasattr(parameter, "device_mesh") for parameter in parameters)
    if (
        type(optimizer) not in FUSED_OPTIMIZERS
        or not left_open
        or differentiable
        or sparse_gradients
        or not supported
        or (type(optimizer) is torch.optim.SGD and sharded)
    ):
        return False
    optimizer.defaults["fused"] = True
    for group in groups:
        group["fused"] = True
    return True
