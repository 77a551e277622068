"""Activation checkpointing (gradient checkpointing): recompute a block in backward, keep none of its
activations.

`full` recomputes all blocks, `every:N` each N-th, `selective` all but their expensive operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from strategies.torch_compat import expensive_operators, rebind_forward

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def select_blocks(blocks: list[nn.Module], mode: str) -> list[nn.Module]:
    """The blocks that `activation_checkpointing=mode` recomputes. Raises ValueError if there are none."""
    if mode == "none":
        return []
    if not blocks:
        raise ValueError(
            f"activation_checkpointing={mode} has no effect: the recipe names no blocks; "
            "return the model's repeated parts from blocks(), or drop the key"
        )
    kind, _, every = mode.partition(":")
    if kind == "every" and int(every) > len(blocks):
        raise ValueError(
            f"activation_checkpointing={mode} has no effect on {len(blocks)} blocks: "
            f"give every:N with N up to {len(blocks)}"
        )
    return blocks[int(every) - 1 :: int(every)] if kind == "every" else blocks


def checkpoint_blocks(blocks: list[nn.Module], selective: bool) -> None:
    """Let each block recompute itself in backward, in place; `selective`: all but its expensive operators.

    Raises UnsupportedVersionError if torch has other names for those operators.
    """
    if selective:
        expensive_operators()
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        contexts = partial(_contexts, norms, selective)
        rebind_forward(block, partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts))


def checkpointed_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` with selective recomputation, to be compiled as one.

    Running statistics need no protection here: the compiler treats their update as an effect of forward, made
    once.
    """
    return checkpoint(forward, *args, use_reentrant=False, context_fn=selective_contexts, **kwargs)


def selective_contexts() -> Contexts:
    """Around forward, and around its recomputation: the results of expensive operators are kept."""
    forward, recomputation = create_selective_checkpoint_contexts(expensive_operators())  # type: ignore[no-untyped-call]
    return forward, recomputation


def _contexts(norms: Sequence[nn.Module], selective: bool) -> Contexts:
    """Around forward, and around its recomputation, which must not update the running statistics again."""
    forward, recomputation = selective_contexts() if selective else (nullcontext(), nullcontext())
    return forward, _restored_statistics(norms, recomputation)


@contextmanager
def _restored_statistics(
    norms: Sequence[nn.Module], recomputation: AbstractContextManager[object]
) -> Iterator[None]:
    """Let the recomputation update copies of BatchNorm's running statistics: it sees the batch a second time.

    Not tracking them at all would save fewer tensors than forward did, which `checkpoint` refuses.
    """
    statistics = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, statistics, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        with recomputation:
            yield
    finally:
        for norm, buffers in zip(norms, statistics, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
