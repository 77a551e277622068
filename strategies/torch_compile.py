"""`compile=`: torch.compile over the blocks of a model, so that blocks of a kind are compiled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from strategies.options import CUDA_GRAPH_MODES
from strategies.torch_compat import rebind_forward

RECOMPILE_LIMIT = 64
"""compilations of one `forward` before it runs uncompiled; the blocks of a ResNet use up torch's 8 before its
first evaluation
"""


def compile_blocks(
    blocks: list[nn.Module], mode: bool | str, wrapper: Callable[..., Any] | None = None
) -> None:
    """Compile `forward` of each block, in place; blocks that look alike share what is compiled.

    torch keeps it with the code of a class, not with an instance. `wrapper(forward, ...)` is compiled in
    place of `forward`. Raises torch's recompilation limit for the whole process, to RECOMPILE_LIMIT at least.
    """
    from torch.compiler import config  # takes seconds to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    alike = len({(type(block), *(tuple(p.shape) for p in block.parameters())) for block in blocks}) == 1
    # torch takes a size that differs from one call to the next for a dynamic one. Between blocks of different
    # sizes none is, and code for any size is slow to compile and to run.
    compiler = partial(torch.compile, mode=None if mode is True else mode, dynamic=None if alike else False)
    if wrapper is None:
        for block in blocks:
            rebind_forward(block, compiler(block.forward))
        return
    # the full graph, or an error: after a graph break `wrapper` would run uncompiled
    compiled = compiler(wrapper, fullgraph=True)
    for block in blocks:
        rebind_forward(block, partial(compiled, block.forward))


def begin_step(mode: bool | str) -> None:
    """Before the calls of one micro-batch or evaluation batch: the memory of CUDA graphs may be reused.

    Left alone, torch starts anew at each block outside of training, and overwrites the block's input
    (https://github.com/pytorch/pytorch/issues/152887).
    """
    if mode in CUDA_GRAPH_MODES:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def refuse_accumulation(mode: bool | str, device: str) -> None:
    """Raise ValueError where gradients cannot be accumulated: CUDA graphs may reuse their memory.

    An error or, in some versions of torch, wrong gradients
    (https://github.com/pytorch/pytorch/issues/169545).
    """
    if mode in CUDA_GRAPH_MODES and torch.device(device).type == "cuda":
        raise ValueError(
            f"compile={mode} does not go with gradient accumulation: CUDA graphs overwrite the gradients; "
            "use compile=default, or set micro_batch_size so that each rank takes its part of a batch at once"
        )
