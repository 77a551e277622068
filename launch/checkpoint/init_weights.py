"""`init=`: pretrained weights from elsewhere into a new run, each rank reading only its own shard.

`weight_sources.py` opens them, `name_matching.py` finds which name is which; here it is decided whether they
fit the models of the run, and they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from launch.checkpoint.name_matching import Matching, Shape, match_names
from launch.checkpoint.weight_sources import SourceTensor, locate, open_source
from launch.runtime.collectives import broadcast_object, first_error
from launch.runtime.wording import join_names, shape_text
from launch.state.run import Run


class Target(NamedTuple):
    """A tensor of the run."""

    model: str
    name: str
    """as the strategy names it"""
    shape: Shape


class MatchedWeights:
    """What was found for one model (a `StateReader` of the strategies)."""

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D, on the host."""
        return self.tensors[name].read(start, stop)


def load_initial_weights(run: Run, path: str) -> str:
    """Load the weights in `path` into the models of `run`; returns what was loaded, as text.

    Collective. Raises ValueError, on all ranks, if the file cannot be read, or does not fit the models and
    `init_partial` is not set.
    """
    # rank zero says which checkpoint of a run is the newest: another run may be saving there
    source = Path(broadcast_object(str(locate(Path(path))) if run.world.rank == 0 else ""))
    where, error = str(source), ""
    plan: LoadPlan | None = None
    with ExitStack() as stack:
        try:
            tensors, key = open_source(source, list(run.strategies), run.world, stack)
            where += key
            plan = plan_loading(tensors, targets_of(run))
            plan.check(run.config.init_partial)
        except (ValueError, OSError) as problem:
            error = f"init={where}: {problem}"
        if any_error := first_error(error):
            raise ValueError(error or any_error)
        assert plan is not None
        for model, strategy in run.strategies.items():
            strategy.load_state(plan.weights_for(model), weights_only=True)
    return f"weights from {where} ({'; '.join([plan.summary, *plan.differences])})"


def targets_of(run: Run) -> dict[str, Target]:
    """The tensors of the run as `model.safetensors` names them; tied ones under each of their names, the
    first one first.
    """
    targets: dict[str, Target] = {}
    for model, strategy in run.strategies.items():
        prefix = f"{model}." if len(run.strategies) > 1 else ""
        of_model = {
            name.removeprefix("model/"): Target(model, name, shape)
            for name, shape in strategy.layout.shapes.items()
        }
        of_model |= {alias: of_model[name] for alias, name in strategy.layout.tied.items()}
        targets |= {prefix + name: target for name, target in of_model.items()}
    return targets


# what fits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadPlan:
    """What each tensor of the run is loaded from, and what does not fit."""

    sources: dict[Target, SourceTensor]
    missing: list[str]
    """tensors of the run that the file does not hold"""
    unused: list[str]
    """tensors of the file that the run does not have"""
    wrong_shape: list[str]
    """tensors of another shape, with both shapes, as text"""
    matching: Matching
    rival_prefix: str
    """of a second way to match the names that is just as good; empty if there is none"""

    @property
    def summary(self) -> str:
        """How many tensors are loaded, and by which prefix they were found."""
        count = len(self.sources)
        total = count + len(self.wrong_shape) + len(self.missing)
        prefix = f", {self.matching.prefix}" if self.matching.prefix else ""
        return f"{count} of {total} tensors{prefix}"

    @property
    def differences(self) -> list[str]:
        """What does not fit, as text."""
        kinds = (
            ("not in the file", self.missing),
            ("not used by the model", self.unused),
            ("of another shape", self.wrong_shape),
        )
        return [f"{kind}: {len(names)} ({join_names(names)})" for kind, names in kinds if names]

    def check(self, allow_partial: bool) -> None:
        """Raises ValueError if nothing fits, if not all fits and `allow_partial` is not set, or if it is not
        clear what fits what.
        """
        differences = "; ".join(self.differences)
        if not self.sources:
            raise ValueError(f"nothing in it fits the model; {differences}")
        if differences and not allow_partial:
            raise ValueError(
                f"it fits {self.summary}; {differences}. If that is meant, say init_partial=true"
            )
        if differences and self.rival_prefix:
            raise ValueError(
                f"it fits in two ways, {self.matching.prefix} and {self.rival_prefix}; "
                "save it with the names of the model"
            )

    def weights_for(self, model: str) -> MatchedWeights:
        """What is loaded into one model."""
        return MatchedWeights(
            {target.name: tensor for target, tensor in self.sources.items() if target.model == model}
        )


def plan_loading(tensors: Mapping[str, SourceTensor], targets: Mapping[str, Target]) -> LoadPlan:
    """Match the tensors of a file with those of the run."""
    matching, rival_prefix = match_names(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: target.shape for name, target in targets.items()},
    )
    sources: dict[Target, SourceTensor] = {}
    wrong_shape: dict[Target, str] = {}
    for name, target in targets.items():
        if (source := matching.pairs.get(name)) is None:
            continue
        tensor = tensors[source]
        if tensor.shape == target.shape:
            sources.setdefault(target, tensor)
        else:
            shapes = f"{shape_text(target.shape)}, in the file {shape_text(tensor.shape)}"
            wrong_shape[target] = f"{name} {shapes}"
    first_names: dict[Target, str] = {}  # a tied tensor is reported by its first name
    for name, target in targets.items():
        first_names.setdefault(target, name)
    missing = [
        name
        for target, name in first_names.items()
        if target not in sources and target not in wrong_shape and not may_be_missing(target)
    ]
    used = {id(tensors[source]) for source in matching.pairs.values()}
    return LoadPlan(
        sources=sources,
        missing=missing,
        unused=[name for name, tensor in tensors.items() if id(tensor) not in used],
        wrong_shape=[text for target, text in wrong_shape.items() if target not in sources],
        matching=matching,
        rival_prefix=rival_prefix,
    )


def may_be_missing(target: Target) -> bool:
    """Whether a file need not hold it: BatchNorm's counter, as torch has it (files from before torch 0.4.1
    have none), and empty tensors.
    """
    return target.name.endswith("num_batches_tracked") or 0 in target.shape
