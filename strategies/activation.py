"""Activation ("gradient") checkpointing: recompute a block in backward instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Rebind `forward` of each block in place: a wrapper module would leak its prefix into the parameter names.

    Raises ValueError if there is no block.
    """
    if not blocks:
        raise ValueError(
            "activation_checkpointing=true has no effect: the recipe names no blocks; return the model's repeated parts "
            "from blocks(), or drop the key"
        )
    for block in blocks:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        contexts = partial(_contexts, norms) if norms else None
        keywords = {"context_fn": contexts} if contexts else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **keywords)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """The recomputation sees the batch a second time: without this the running statistics would move twice a step.

    It moves copies. Not tracking at all would save fewer tensors than forward did, which `checkpoint` refuses.
    """
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
