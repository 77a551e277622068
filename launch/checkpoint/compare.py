"""Where two checkpoints differ, whoever wrote them: their configurations, their optimizers, their tensors.
Read in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.cli.config import flatten

CHUNK = 2**21
"""elements that are compared at a time, in double precision"""
ABSENT = "(none)"


class Change(NamedTuple):
    """Something that is not the same in both."""

    name: str
    old: Any
    new: Any


class Apart(NamedTuple):
    """A tensor of which some elements differ. NaN differs from any number and not from NaN."""

    name: str
    largest: float
    """absolute difference; infinite where only one is finite"""
    relative: float
    """to the largest finite value of either"""
    differ: int
    """elements that differ"""
    numel: int


@dataclass(kw_only=True)
class Difference:
    """What `compare` found."""

    config: list[Change]
    optimizers: list[Change]
    tensors: list[Change]
    """that only one has, or with another shape or type"""
    apart: list[Apart] = field(default_factory=list)
    """largest first"""
    equal: int = 0
    """how many tensors are the same"""

    @property
    def same_state(self) -> bool:
        """Whether a run would go on alike from both: tensors and optimizers."""
        return not (self.optimizers or self.tensors or self.apart)


def compare(
    first: Checkpoint, second: Checkpoint, on_progress: Callable[[int], object] = lambda _: None
) -> Difference:
    """Compare all; `on_progress` hears of each number of bytes compared. Raises Damaged if a file cannot be
    read.
    """
    old, new = first.manifest, second.manifest
    found = Difference(
        config=changes(dict(flatten(old.config)), dict(flatten(new.config))),
        optimizers=changes(settings(old), settings(new)),
        tensors=changes(kinds(old), kinds(new)),
    )
    for name in shared(old, new):
        apart = compare_tensor(first, second, name, on_progress)
        if apart.differ:
            found.apart.append(apart)
        else:
            found.equal += 1
    found.apart.sort(key=lambda apart: -apart.largest)
    return found


def shared(old: Manifest, new: Manifest) -> list[str]:
    """The tensors whose values can be compared: in both, of one shape and type."""
    known = kinds(new)
    return [name for name, kind in kinds(old).items() if known.get(name) == kind]


def kinds(manifest: Manifest) -> dict[str, str]:
    """Type and shape of each tensor."""
    return {name: f"{entry.dtype} {entry.shape}" for name, entry in manifest.tensors.items()}


def settings(manifest: Manifest) -> dict[str, Any]:
    """All parameter groups as one flat mapping."""
    return {
        f"{model}, group {n}: {name}": value
        for model, groups in manifest.optimizers.items()
        for n, group in enumerate(groups)
        for name, value in flatten({**group, "parameters": dict.fromkeys(group["parameters"], "in it")})
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The names whose values differ, those that one does not have among them."""
    names = dict.fromkeys([*old, *new])
    pairs = [Change(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in names]
    return [change for change in pairs if change.old != change.new]


def compare_tensor(
    first: Checkpoint, second: Checkpoint, name: str, on_progress: Callable[[int], object]
) -> Apart:
    """How far the two of a name lie apart."""
    numel = first.manifest.tensors[name].numel
    largest, value, count = 0.0, 0.0, 0
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        old, new = first.read(name, start, stop), second.read(name, start, stop)
        on_progress(old.nbytes)
        differ = (old != new) & ~(old.isnan() & new.isnan())
        value = max(value, finite(old), finite(new))
        if differ.any():
            count += int(differ.sum())
            distance = (wide(old[differ]) - wide(new[differ])).abs()
            largest = max(largest, float(distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    relative = largest / value if value else largest and torch.inf
    return Apart(name, largest, relative, count, numel)


def finite(values: Tensor) -> float:
    """The largest finite magnitude."""
    return float(wide(values).abs().nan_to_num(nan=0.0, posinf=0.0).max())


def wide(values: Tensor) -> Tensor:
    """In double precision: neither rounded nor out of range."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
