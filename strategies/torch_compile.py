"""`compile=`: torch.compile over the blocks of a model, so that blocks of a kind share what is compiled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from strategies.options import CUDA_GRAPH_MODES

RECOMPILE_LIMIT = 64
"""compilations of one `forward` before it runs uncompiled; torch's 8 are used up by the blocks of a ResNet
before it evaluates
"""


def compile_parts(parts: list[nn.Module], mode: bool | str, around: Callable[..., Any] | None = None) -> None:
    """Rebind `forward` of each part in place, since wrapping would change the parameter names.

    What is compiled belongs to the code of a class, not to an instance: parts that look alike share it.
    `around(forward, ...)` is compiled in place of `forward`.
    """
    from torch._dynamo import config  # takes seconds to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    alike = len({(type(part), *(tuple(p.shape) for p in part.parameters())) for part in parts}) == 1
    # torch takes a size that differs from one call to the next for one that varies. Between parts of
    # different sizes nothing does, and code for any size is slow to compile and to run.
    compiler = partial(torch.compile, mode=None if mode is True else mode, dynamic=None if alike else False)
    if around is None:
        for part in parts:
            part.forward = compiler(part.forward)
        return
    # whole, or not at all: where a graph broke, `around` would run uncompiled
    compiled = compiler(around, fullgraph=True)
    for part in parts:
        part.forward = partial(compiled, part.forward)


def begin(mode: bool | str) -> None:
    """Before the calls of one micro-batch, or of one batch of an evaluation: the memory of CUDA graphs may be
    used again.

    Left alone, torch starts anew at each block outside of training, and overwrites the block's input
    (https://github.com/pytorch/pytorch/issues/152887).
    """
    if mode in CUDA_GRAPH_MODES:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def refuse_accumulation(mode: bool | str, device: str) -> None:
    """Raise ValueError if gradients cannot be accumulated: torch may leave them in memory that the next graph
    overwrites.

    An error or, in some versions, wrong gradients (https://github.com/pytorch/pytorch/issues/169545).
    """
    if mode in CUDA_GRAPH_MODES and torch.device(device).type == "cuda":
        raise ValueError(
            f"compile={mode} does not go with gradient accumulation: CUDA graphs overwrite the gradients; use compile=default, "
            "or set micro_batch_size so that each rank takes its share of a batch at once"
        )
