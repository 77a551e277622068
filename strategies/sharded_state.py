"""The sharded state dict: slices of flattened tensors, the same form of a model for every strategy.

DDP holds whole tensors, FSDP2 dim-0 shards, ZeRO slices of flat partitions: each is a contiguous range of the
flattened parameter. So any strategy at any world size can load what another has saved, and no rank ever
gathers a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

READ_CHUNK = 2**22
"""elements that are read from a checkpoint at a time: memory of that size is reused, larger pieces are
faulted in anew
"""

Shape = tuple[int, ...]


class TensorSlice(NamedTuple):
    """What one rank writes of one tensor."""

    values: Tensor
    """1-D, on any device; shares memory with the model where it can"""
    start: int
    """position of `values[0]` in the flattened whole"""
    shape: Shape
    """shape of the whole"""


class Shard(NamedTuple):
    """This rank's part of one tensor, and which of several identical copies it is."""

    values: Tensor
    """of any number of dimensions, possibly empty; writing to it changes the model"""
    start: int
    """position of its first element in the flattened whole"""
    shape: Shape
    """shape of the whole"""
    copy: int = 0
    """which of the `copies` this rank holds"""
    copies: int = 1
    """ranks that hold the same part; they divide the writing among themselves"""

    def owned(self) -> TensorSlice | None:
        """What this rank writes of it, if anything: its share of the copies."""
        start, stop = slice_for_rank(self.values.numel(), self.copy, self.copies)
        if stop <= start:
            return None
        return TensorSlice(self.values.reshape(-1)[start:stop], self.start + start, self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model and its optimizer as a whole, however they are sharded: plain data, the same on all ranks."""

    shapes: dict[str, Shape]
    """of parameters and persistent buffers by their names in `state` (`model/NAME`); tied ones once"""
    tied: dict[str, str]
    """further names of tied tensors, each with its name in `shapes` (both without `model/`)"""
    parameter_groups: list[dict[str, Any]]
    """what `describe_parameter_groups` says of the optimizer; empty for a model without one"""
    num_parameters: int
    """of the whole model, tied ones counted once"""


class StateReader(Protocol):
    """Saved tensors, read by ranges (`launch.checkpoint` reads them from a checkpoint)."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each saved tensor, whole, by name."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, on the host."""


def slice_for_rank(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The [start, stop) that `rank` writes of a tensor of which all ranks hold the whole."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def load_shard(shard: Shard, name: str, reader: StateReader) -> None:
    """Read this rank's part of the saved tensor `name` into `shard`."""
    values, start = shard.values, shard.start
    if not values.is_contiguous():
        values.copy_(reader.read(name, start, start + values.numel()).view(values.shape))
        return
    flat = values.view(-1)
    for first in range(0, len(flat), READ_CHUNK):
        last = min(first + READ_CHUNK, len(flat))
        flat[first:last].copy_(reader.read(name, start + first, start + last))


# names ------------------------------------------------------------------------------------------------------


def unique_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of `module`; a tied tensor comes once, under its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of tied tensors, each with the name under which `unique_state` yields it."""
    first_names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and (first := first_names.setdefault(id(tensor), name)) != name:
            tied[name] = first
    return tied


# optimizers -------------------------------------------------------------------------------------------------

NOT_SAVED = ("params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable")
"""settings of a parameter group that are not described: the learning rate, which moves, and what only says
how the update is computed
"""


def describe_parameter_groups(optimizer: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups as plain data: the optimizer's class, names of parameters, settings."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        {
            "optimizer": type(optimizer).__name__,
            "parameters": [names.get(parameter, "?") for parameter in group["params"]],
            "settings": {key: as_json(value) for key, value in group.items() if key not in NOT_SAVED},
        }
        for group in optimizer.param_groups
    ]


def as_json(value: Any) -> Any:
    """A setting of an optimizer as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def is_per_element(key: str, shape: Shape, parameter_shape: Shape) -> bool:
    """Whether a state `key` of the optimizer holds a number for each element of its parameter (a moment).

    Others are scalars (the step); a scalar parameter has the shape of a step counter.
    """
    return shape == parameter_shape and (shape != () or key != "step")


def scalars_on_device(settings: Mapping[str, Any]) -> bool:
    """Whether an optimizer with these settings wants its step counters on the device, not on the host."""
    return bool(settings.get("fused") or settings.get("capturable"))


def empty_optimizer_state(optimizer: Optimizer, parameter: Tensor, key: str, shape: Shape) -> Tensor:
    """Room for the saved `optimizer.state[parameter][key]`: like the parameter, or a step counter."""
    if is_per_element(key, shape, tuple(parameter.shape)):
        return torch.empty_like(parameter, requires_grad=False)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return torch.zeros(shape, device=parameter.device if scalars_on_device(group) else "cpu")
