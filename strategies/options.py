"""The options of strategies. Plain dataclasses, no torch: the docstring under a field is its line in
`--help`, the annotated type its range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt

StrategyName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""modes of `compile` that replay CUDA graphs"""


@dataclass(kw_only=True)
class DDPOptions:
    """`ddp.*`: torch's DistributedDataParallel."""

    bucket_mb: PositiveInt = 25
    """gradients are reduced in buckets of this many MB"""
    static_graph: bool = False
    """the set of used parameters never changes: lets DDP skip its bookkeeping"""
    find_unused_parameters: bool = False
    """let parameters go without gradient (otherwise an error names them)"""
    compress: Literal["none", "bf16"] = "none"
    """bf16: reduce gradients in bf16, half the traffic; they are rounded, and the losses then depend on the
    number of ranks
    """


@dataclass(kw_only=True)
class FSDPOptions:
    """`fsdp.*`: torch's FSDP2 (`fully_shard`)."""

    shard: Literal["full", "grad", "hybrid"] = "full"
    """full: parameters, gradients and optimizer state; grad: parameters stay whole between forward and
    backward; hybrid: full inside groups of fsdp.shard_size ranks, replicated across the groups
    """
    shard_size: PositiveInt | None = None
    """ranks that share one copy under fsdp.shard=hybrid (default: the ranks of one node)"""
    cpu_offload: bool = False
    """keep parameters, gradients and optimizer state in host memory"""
    sync_every_micro_batch: bool = False
    """reduce gradients after each micro-batch: more communication, but no whole gradient is held while
    accumulating
    """


@dataclass(kw_only=True)
class ZeroOptions:
    """`zero.*`: DeepSpeed ZeRO."""

    cpu_offload: bool = False
    """keep the optimizer state (under zero3 the parameters too) in host memory"""
    bucket_mb: PositiveInt = 50
    """gradients are reduced in buckets of this many MB"""


@dataclass(kw_only=True)
class Options:
    """The options that every strategy gets."""

    strategy: StrategyName | Literal["auto"] = "auto"
    """how the model is spread over ranks; auto: single on one rank, ddp on more"""
    seed: int = 0
    """seed of everything random"""
    precision: Precision = "fp32"
    """compute precision; parameters, reductions and optimizer state stay fp32"""
    activation_checkpointing: str | bool = "none"
    """recompute the recipe's blocks in backward instead of keeping their activations: none; full (or true):
    all of them; every:N: each N-th; selective: all, but for their matrix products, convolutions and attention
    """
    compile: Literal[False, True, "default", "reduce-overhead", "max-autotune"] = False
    """torch.compile the recipe's blocks (the whole model if it names none), in torch's mode of that name;
    true: default; reduce-overhead: with CUDA graphs, for small models; max-autotune: tries kernels out as
    well, for minutes
    """
    clip_norm: PositiveFloat | None = None
    """clip the global gradient norm to this value"""
    clip_value: PositiveFloat | None = None
    """clip each gradient element to [-value, value]"""
    ddp: DDPOptions = field(default_factory=DDPOptions)
    fsdp: FSDPOptions = field(default_factory=FSDPOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown mode of activation_checkpointing."""
        given = str(self.activation_checkpointing)
        mode = {"true": "full", "false": "none"}.get(given.lower(), given)
        if mode not in ("none", "full", "selective") and not re.fullmatch("every:0*[1-9][0-9]*", mode):
            raise ValueError(
                f"activation_checkpointing={given} is not none|full|every:N|selective; "
                "give one of them, for every:N a number of blocks from 1 (every:2)"
            )
        self.activation_checkpointing = mode
