"""Every undocumented name of torch that the strategies touch, each with the reason.

All are looked up when a strategy is set up, none at import: a name that is missing is an
UnsupportedVersionError that names the installed version of torch and the tested one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies.compat import require

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule  # half a second, which only FSDP should take

TESTED = "2.14.1"

FOREACH = ("_foreach_norm", "_foreach_mul_", "_foreach_clamp_min_", "_foreach_clamp_max_")
"""one kernel over many tensors; the documented `clip_grad_norm_` takes no norm of the loop's, no loss scale
and no float64
"""

EXPENSIVE_OPERATORS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""in `torch.ops.aten`. The idea, and most of the list, are torchtitan's
(distributed/activation_checkpoint.py), after https://pytorch.org/blog/activation-checkpointing-techniques/:
what is expensive to compute is kept, what is cheap is recomputed. The dispatcher knows attention by these
names only
"""


def check() -> None:
    """Raise UnsupportedVersionError unless torch has what every strategy uses."""
    _require(torch, *FOREACH)


def _require(owner: object, *names: str) -> None:
    require(owner, names, "torch", TESTED)


# gradients --------------------------------------------------------------------------------------------------


def foreach_norm(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The 2-norm of each tensor, a scalar; computed in `dtype` if given."""
    norms: Sequence[Tensor] = (
        torch._foreach_norm(tensors, 2) if dtype is None else torch._foreach_norm(tensors, 2, dtype=dtype)
    )
    return list(norms)


def foreach_multiply(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors by one number, in place."""
    torch._foreach_mul_(tensors, factor)


def foreach_clamp(tensors: list[Tensor], limit: float) -> None:
    """Clamp all elements to [-limit, limit], in place."""
    torch._foreach_clamp_min_(tensors, -limit)
    torch._foreach_clamp_max_(tensors, limit)


# modules ----------------------------------------------------------------------------------------------------


def rebind_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` compute `forward` instead of the method of its class.

    A wrapper module, the documented way, would put a prefix into the names of all parameters below it, and so
    into checkpoints; `nn.Module.compile` would compile the hooks of FSDP and ZeRO along with the block.
    """
    module.forward = forward


def expensive_operators() -> list[Any]:
    """The operators whose results selective activation checkpointing keeps.

    Raises UnsupportedVersionError if one is missing: it would be recomputed, and nothing would say so.
    """
    _require(torch.ops.aten, *EXPENSIVE_OPERATORS)
    return [getattr(torch.ops.aten, name).default for name in EXPENSIVE_OPERATORS]


# DDP --------------------------------------------------------------------------------------------------------


def no_buffer_sync() -> dict[str, Any]:
    """The argument by which DDP leaves buffers alone: renamed in torch 2.14, which warns of the old name."""
    names = ("forward_sync_buffers", "broadcast_buffers")
    known = signature(DistributedDataParallel).parameters
    return {next((name for name in names if name in known), names[0]): False}


def check_ddp(model: DistributedDataParallel) -> None:
    """Raise UnsupportedVersionError unless `incomplete_reduction` can ask this model."""
    _require(model, "reducer")
    _require(model.reducer, "_check_reducer_finalized")


def incomplete_reduction(model: DistributedDataParallel) -> RuntimeError | None:
    """DDP's complaint about parameters that its last backward pass did not reach; None if it reached all.

    DDP itself complains in the next forward pass only: too late, since the other ranks wait in this step.
    """
    try:
        model.reducer._check_reducer_finalized()
    except RuntimeError as error:
        return error
    return None


# FSDP2 ------------------------------------------------------------------------------------------------------


def check_fsdp(root: FSDPModule, device: torch.device) -> None:
    """Raise UnsupportedVersionError unless `clear_fsdp_forward_record` finds what it clears."""
    _require(root, "_get_fsdp_state")
    state = root._get_fsdp_state()
    _require(state, "_comm_ctx")
    _require(state._comm_ctx, "lazy_init")
    context = type(state._comm_ctx)()
    context.lazy_init(device)  # as the first forward pass does
    _require(context, "post_forward_order")


def clear_fsdp_forward_record(root: FSDPModule) -> None:
    """Empty FSDP2's list of modules that were called; only a backward pass through them empties it.

    For a model that is called and never trained it would grow without bound, and keep activations alive. The
    documented `reset_iter_state` does more: it discards gradients that are being accumulated.
    """
    context = root._get_fsdp_state()._comm_ctx
    if hasattr(context, "post_forward_order"):  # else there was no forward pass yet
        context.post_forward_order.clear()
