"""The strategy-neutral form of a run's tensors: contiguous ranges of flattened tensors, under plain names.

DDP holds whole tensors, FSDP2 dim-0 shards, ZeRO slices of flat partitions: each is a contiguous range of the
flattened parameter, so one form serves all, and no rank ever gathers a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class TensorSlice(NamedTuple):
    """What one rank writes of one tensor."""

    values: Tensor
    """1-D, on any device"""
    start: int
    """position of `values[0]` in the flattened whole"""
    shape: tuple[int, ...]
    """shape of the whole"""


class StateReader(Protocol):
    """Saved tensors, read by ranges (`launch.checkpoint` reads them from a checkpoint)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each saved tensor, whole, by name."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, on the host."""


def unique_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of `module`; a tied tensor comes once, under its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of tied tensors, each with the name under which `unique_state` yields it."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
    return tied


def described_groups(optimizer: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups as plain data: the optimizer, the names of the parameters, and what is set for
    them.

    What only says how the update is computed (fused, foreach) is left out, and the learning rate, which
    moves.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        {
            "optimizer": type(optimizer).__name__,
            "parameters": [names.get(parameter, "?") for parameter in group["params"]],
            "settings": {key: plain(value) for key, value in group.items() if key not in UNSAVED},
        }
        for group in optimizer.param_groups
    ]


UNSAVED = ("params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable")


def plain(value: Any) -> Any:
    """A setting of an optimizer as JSON knows it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def slice_for_rank(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The [start, stop) of a tensor that all ranks hold whole which `rank` writes."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def empty_optimizer_state(
    optimizer: Optimizer, parameter: Tensor, key: str, shape: tuple[int, ...]
) -> Tensor:
    """A tensor to load the saved `optimizer.state[parameter][key]` into: like the parameter, or a step
    counter.

    Fused and capturable optimizers want their step counters on the device, the others on the host.
    """
    if shape == tuple(parameter.shape) and (
        shape or key != "step"
    ):  # a scalar parameter has the shape of a counter
        return torch.empty_like(parameter, requires_grad=False)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = group.get("fused") or group.get("capturable")
    return torch.zeros(shape, device=parameter.device if on_device else "cpu")
