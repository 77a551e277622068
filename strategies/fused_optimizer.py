"""The update of all parameters in one kernel (`fused=True` of torch's optimizers), where the recipe has left
the choice open.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

KINDS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""those whose fused update exists on a CPU as on a GPU, in all versions of torch that we support"""


def fuse(optimizer: Optimizer, module: nn.Module) -> bool:
    """Let `optimizer` update in one kernel, if it can; whether it does now. Call it before the first step.

    Left alone, torch takes several kernels for many tensors (`foreach`) on a GPU, and one by one on a CPU:
    its documentation calls the fused update the fastest, and keeps it from being the default until it has
    been in use for longer (https://docs.pytorch.org/docs/stable/optim.html). A recipe that says `fused` or
    `foreach` by itself has the last word.
    """
    groups = optimizer.param_groups
    left_open = all(group.get(key) is None for group in groups for key in ("fused", "foreach")) and not any(
        group.get("differentiable") for group in groups
    )
    dense = not any(
        getattr(part, "sparse", False) for part in module.modules()
    )  # embeddings with sparse gradients
    parameters = [parameter for group in groups for parameter in group["params"]]
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    # "Operator aten._fused_sgd_.default does not have a sharding strategy registered" (torch 2.14). Only a
    # DTensor has a mesh; to import its class for the question would make each start half a second longer.
    sharded = type(optimizer) is torch.optim.SGD and any(
        hasattr(parameter, "device_mesh") for parameter in parameters
    )
    if type(optimizer) not in KINDS or not (left_open and dense and plain) or sharded:
        return False
    optimizer.defaults["fused"] = True
    for group in groups:
        group["fused"] = True
    return True
