"""Activation ("gradient") checkpointing: recompute a block in backward instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# The idea, and most of the list, are torchtitan's (distributed/activation_checkpoint.py), on the ground of
# https://pytorch.org/blog/activation-checkpointing-techniques/: what is dear to compute is kept, what is
# cheap is computed again.
aten = torch.ops.aten
EXPENSIVE = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.linear.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
]


def select_blocks(blocks: list[nn.Module], mode: str) -> list[nn.Module]:
    """The blocks to recompute under `activation_checkpointing=mode`. Raises ValueError if that has no effect."""
    if mode == "none":
        return []
    if not blocks:
        raise ValueError(
            f"activation_checkpointing={mode} has no effect: the recipe names no blocks; return the model's repeated parts "
            "from blocks(), or drop the key"
        )
    kind, _, every = mode.partition(":")
    if kind == "every" and int(every) > len(blocks):
        raise ValueError(
            f"activation_checkpointing={mode} has no effect on {len(blocks)} blocks: give every:N with N up to {len(blocks)}"
        )
    return blocks[int(every) - 1 :: int(every)] if kind == "every" else blocks


def checkpoint_blocks(blocks: list[nn.Module], selective: bool) -> None:
    """Rebind `forward` of each block in place: a wrapper module would leak its prefix into the parameter
    names.
    """
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        contexts = partial(_contexts, norms, selective)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def checkpointed_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward`, to be compiled with its recomputation.

    Running statistics need no protection here: the compiler knows their update for an effect of forward, made
    once.
    """
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)


_selective_contexts = partial(create_selective_checkpoint_contexts, EXPENSIVE)
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def _contexts(norms: list[_BatchNorm], selective: bool) -> Contexts:
    """Around forward, and around its recomputation."""
    keeping: Contexts = _selective_contexts() if selective else (nullcontext(), nullcontext())
    return keeping[0], _statistics_kept(norms, keeping[1])


@contextmanager
def _statistics_kept(
    norms: list[_BatchNorm], recomputation: AbstractContextManager[object]
) -> Iterator[None]:
    """The recomputation sees the batch a second time: without this the running statistics would move twice a
    step.

    It moves copies. Not tracking at all would save fewer tensors than forward did, which `checkpoint`
    refuses.
    """
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        with recomputation:
            yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
