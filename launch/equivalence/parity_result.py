"""How far a run under a strategy lies from the single process. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.equivalence.parity_cases import ParityCase
from launch.equivalence.tolerances import TOLERANCES, describe_growth

if TYPE_CHECKING:
    from torch import Tensor

    Trajectory = Mapping[str, Tensor]
    """what `launch.equivalence.trajectory.follow` recorded, by name"""

WEIGHT_SCALE_MIN = 0.01
"""weights deviate relative to the largest value of their tensor, or to this where all are smaller (a bias
that starts at zero)
"""


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """A row of the table: the largest relative deviations of one case from its reference."""

    case: ParityCase
    loss: float = 1.0
    grad_norm: float = 1.0
    weights: float = 1.0
    between_strategies: float = 1.0
    """of losses and gradient norms, from DDP"""
    problem: str = ""
    """what is wrong; empty if the row passes"""


def compare_case(case: ParityCase, trajectories: Mapping[str, Trajectory], precision: str) -> ParityResult:
    """The row of one case; `trajectories` are by the name of their case."""
    if case.name not in trajectories or case.reference not in trajectories:
        return ParityResult(case=case, problem="did not finish: its error is printed above")
    own, reference = trajectories[case.name], trajectories[case.reference]
    noise = elements_without_gradient(reference)
    deviations = {
        "loss": max_deviation(own, reference, ("loss/",)),
        "gradient norm": max_deviation(own, reference, ("norm/",)),
        "weights": max_weight_deviation(own, reference, noise),
        "deviation from ddp": max_deviation(own, trajectories.get(case.peer, own), ("loss/", "norm/")),
    }
    loss, grad_norm, weights, between_strategies = deviations.values()
    # `not <=`: NaN is too far off
    too_far = [
        name
        for (name, deviation), tolerance in zip(deviations.items(), TOLERANCES[precision], strict=True)
        if not deviation <= tolerance
    ]
    problem = ""
    if too_far:
        first = describe_first_deviation(own, reference, noise, precision)
        problem = f"{' and '.join(too_far)} too far off, {first}"
    return ParityResult(
        case=case,
        loss=loss,
        grad_norm=grad_norm,
        weights=weights,
        between_strategies=between_strategies,
        problem=problem,
    )


def max_deviation(own: Trajectory, other: Trajectory, prefixes: tuple[str, ...]) -> float:
    """The largest relative deviation of any step, of the series whose names begin so."""
    return max(float(elementwise_deviation(own[n], other[n]).max()) for n in own if n.startswith(prefixes))


def max_weight_deviation(own: Trajectory, reference: Trajectory, noise: Mapping[str, Tensor]) -> float:
    """The largest deviation of a final weight, relative to the largest value of its tensor; `noise` is left
    out.
    """
    deviations = []
    for name in names_with(own, "weights/"):
        expected = reference[f"weights/{name}"]
        distance = (own[f"weights/{name}"] - expected).abs()
        if name in noise:
            distance = distance * ~noise[name]
        deviations.append(float(distance.max() / expected.abs().max().clamp(min=WEIGHT_SCALE_MIN)))
    return max(deviations)


def names_with(trajectory: Trajectory, prefix: str) -> Iterator[str]:
    """The names that begin with `prefix`, without it."""
    return (name.removeprefix(prefix) for name in trajectory if name.startswith(prefix))


def elementwise_deviation(own: Tensor, other: Tensor) -> Tensor:
    """Relative deviation, element by element; NaN is infinitely far."""
    return ((own - other).abs() / other.abs().clamp(min=1e-30)).nan_to_num(nan=float("inf"))


def elements_without_gradient(reference: Trajectory) -> dict[str, Tensor]:
    """Elements to leave out, as masks by name: their true gradient is zero, such as that of a bias before
    BatchNorm.

    Adam turns their rounding noise into steps; the running means then contain the bias, so they are left out
    too.
    """
    import torch

    masks = {name: reference[f"noise/{name}"] for name in names_with(reference, "noise/")}
    if any(mask.all() for mask in masks.values()):
        for name in names_with(reference, "weights/"):
            if name.endswith(".running_mean"):
                masks[name] = torch.ones_like(reference[f"weights/{name}"], dtype=torch.bool)
    return masks


def describe_first_deviation(
    own: Trajectory, reference: Trajectory, noise: Iterable[str], precision: str
) -> str:
    """From which step on a run deviates, and in which parameter first."""
    import torch

    tolerance = TOLERANCES[precision].loss
    series = [name for name in own if name.startswith(("loss/", "norm/"))]
    by_step = torch.stack([elementwise_deviation(own[name], reference[name]) for name in series]).amax(0)
    bad_steps = torch.nonzero(by_step > tolerance).flatten().tolist()
    since = "only in the weights"
    if bad_steps:
        growth = describe_growth(by_step.tolist(), bad_steps[0], compare=bad_steps[0])
        since = f"from step {bad_steps[0] + 1} on{growth}"
    by_parameter = {
        name: elementwise_deviation(own[f"fingerprint/{name}"], reference[f"fingerprint/{name}"])
        for name in names_with(own, "fingerprint/")
        if name not in noise
    }
    first_steps = [
        int(torch.nonzero(d > tolerance)[0]) for d in by_parameter.values() if (d > tolerance).any()
    ]
    if not first_steps:
        return since
    step = min(first_steps)
    worst = max(by_parameter, key=lambda name: float(by_parameter[name][step]))
    return f"{since}; the first parameter to deviate is {worst}, after step {step + 1}"
