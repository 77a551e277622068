"""How far two runs may lie apart. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Tolerance(NamedTuple):
    """The largest relative deviations that pass."""

    loss: float
    """from the single process, or from the run that was not interrupted; of gradient norms too in the latter
    case
    """
    grad_norm: float
    """from the single process"""
    weights: float
    """of the final weights, from the single process"""
    between_strategies: float
    """of losses and gradient norms, among the strategies"""


TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, 1e-4, 1e-6),
    "tf32": Tolerance(2e-3, 2e-3, 2e-3, 1e-6),
    "bf16": Tolerance(2e-2, 2e-2, 2e-2, 2e-2),
    "fp16": Tolerance(2e-2, 2e-2, 2e-2, 2e-2),
}
"""by precision; bf16 and fp16 differ where the rounding of a micro-batch does, so theirs is that of the
format
"""
ROUNDING_ERROR = 6e-8
"""half a unit in the last place of fp32"""


def relative_deviation(actual: float, expected: float) -> float:
    """How far a number is from the expected one, relative to that: 0 only if they are equal, infinite if one
    alone is NaN.
    """
    if actual == expected or (math.isnan(actual) and math.isnan(expected)):
        return 0.0
    deviation = abs(actual - expected) / max(abs(expected), 1e-30)
    return math.inf if math.isnan(deviation) else deviation


def describe_growth(deviations: Sequence[float], first_bad: int, compare: int) -> str:
    """Whether it is the run itself that amplifies rounding: deviations that start as rounding errors and grow
    step by step; empty if not.

    `deviations` are those of each step, `first_bad` is the index of the first that is too large, `compare`
    the value of that key with which it would not be reached.
    """
    start = max(deviations[0], ROUNDING_ERROR)
    if first_bad < 2 or start > 10 * ROUNDING_ERROR:
        return ""
    factor = (deviations[first_bad] / start) ** (1 / first_bad)
    return (
        f" (a rounding error at first, growing {factor:.0f}-fold a step: this run amplifies rounding, "
        f"compare={compare} shows more)"
    )
