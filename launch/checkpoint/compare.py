"""Where two checkpoints differ, whoever wrote them: their configurations, their optimizers, their tensors.

Tensors are read in chunks: none has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.cli.keys import flatten

CHUNK_NUMEL = 2**21
"""elements that are compared at a time, in double precision"""
ABSENT = "(none)"


class Change(NamedTuple):
    """A key, a setting or the spec of a tensor that is not the same in both."""

    name: str
    old: Any
    new: Any


class ValueDifference(NamedTuple):
    """A tensor of which some elements differ. NaN differs from any number and not from NaN."""

    name: str
    max_abs: float
    """largest absolute difference; infinite where only one of two values is finite"""
    max_rel: float
    """that, relative to the largest finite value of either tensor"""
    num_different: int
    """elements that differ"""
    numel: int
    """elements of the tensor"""


@dataclass(kw_only=True)
class CheckpointDifference:
    """What differs between two checkpoints."""

    config: list[Change]
    optimizers: list[Change]
    specs: list[Change]
    """tensors that only one has, or that have another shape or dtype"""
    values: list[ValueDifference] = field(default_factory=list)
    """largest first"""
    equal_count: int = 0
    """tensors whose values are the same"""

    @property
    def same_state(self) -> bool:
        """Whether a run would continue alike from both: tensors and optimizers."""
        return not (self.optimizers or self.specs or self.values)


def compare_checkpoints(
    first: Checkpoint, second: Checkpoint, on_progress: Callable[[int], object] = lambda _: None
) -> CheckpointDifference:
    """Compare everything; `on_progress` is called with each number of bytes compared.

    Raises DamagedCheckpoint if a file cannot be read.
    """
    old, new = first.manifest, second.manifest
    difference = CheckpointDifference(
        config=changes_between(dict(flatten(old.config)), dict(flatten(new.config))),
        optimizers=changes_between(optimizer_settings(old), optimizer_settings(new)),
        specs=changes_between(spec_texts(old), spec_texts(new)),
    )
    for name in comparable_tensors(old, new):
        values = compare_tensor(first, second, name, on_progress)
        if values.num_different:
            difference.values.append(values)
        else:
            difference.equal_count += 1
    difference.values.sort(key=lambda values: -values.max_abs)
    return difference


def comparable_tensors(old: Manifest, new: Manifest) -> list[str]:
    """The tensors whose values can be compared: in both, of one shape and dtype."""
    new_specs = spec_texts(new)
    return [name for name, spec in spec_texts(old).items() if new_specs.get(name) == spec]


def spec_texts(manifest: Manifest) -> dict[str, str]:
    """dtype and shape of each tensor."""
    return {name: f"{entry.dtype} {entry.shape}" for name, entry in manifest.tensors.items()}


def optimizer_settings(manifest: Manifest) -> dict[str, Any]:
    """All parameter groups as one flat mapping."""
    return {
        f"{model}, group {index}: {name}": value
        for model, groups in manifest.optimizers.items()
        for index, group in enumerate(groups)
        for name, value in flatten({**group, "parameters": dict.fromkeys(group["parameters"], "in it")})
    }


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The names whose values differ, those that one of the two does not have among them."""
    names = dict.fromkeys([*old, *new])
    pairs = [Change(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in names]
    return [change for change in pairs if change.old != change.new]


def compare_tensor(
    first: Checkpoint, second: Checkpoint, name: str, on_progress: Callable[[int], object]
) -> ValueDifference:
    """How far the tensors `name` of two checkpoints differ; `num_different` is 0 if they do not."""
    numel = first.manifest.tensors[name].numel
    max_abs, max_value, count = 0.0, 0.0, 0
    for start in range(0, numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, numel)
        old, new = first.read(name, start, stop), second.read(name, start, stop)
        on_progress(old.nbytes)
        differs = (old != new) & ~(old.isnan() & new.isnan())
        max_value = max(max_value, max_finite(old), max_finite(new))
        if differs.any():
            count += int(differs.sum())
            distance = (to_double(old[differs]) - to_double(new[differs])).abs()
            max_abs = max(max_abs, float(distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    without_finite = torch.inf if max_abs else 0.0
    max_rel = max_abs / max_value if max_value else without_finite
    return ValueDifference(name, max_abs, max_rel, count, numel)


def max_finite(values: Tensor) -> float:
    """The largest finite magnitude."""
    return float(to_double(values).abs().nan_to_num(nan=0.0, posinf=0.0).max())


def to_double(values: Tensor) -> Tensor:
    """In double precision: neither rounded nor out of range."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
