"""How a resumed run compares with the one that was not interrupted. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.equivalence.compare_metrics import (
    MetricsLine,
    NumberPair,
    describe_unpaired,
    describe_wrong_steps,
    pair_numbers,
    training_steps,
)
from launch.equivalence.subprocesses import RankLayout
from launch.equivalence.tolerances import TOLERANCES, describe_growth


@dataclass(kw_only=True)
class ResumeResult:
    """A row of the table: a killed run, and the run that resumed from its checkpoint."""

    writer: RankLayout
    reader: RankLayout
    killed_in_save: bool = False
    """killed in the middle of a save"""
    killed_at: int = 0
    """the step; 0: not killed for this row"""
    resumed_from: int = 0
    """the step of the checkpoint"""
    compared_steps: int = 0
    """training steps after that"""
    max_deviation: float = math.inf
    """of a loss or a gradient norm after that, relative; 0 is bit-equal"""
    same_weights: bool | None = None
    """whether the exported weights are the same bytes; None: not compared"""
    note: str = ""
    """what is worth knowing, and not wrong"""
    problems: list[str] = field(default_factory=list)
    """empty if the row passes"""

    @property
    def must_be_exact(self) -> bool:
        """Whether every number must be repeated: the same strategy on as many ranks."""
        return self.reader == self.writer


def compare_resumed(
    result: ResumeResult, expected: Sequence[MetricsLine], actual: Sequence[MetricsLine], precision: str
) -> None:
    """Enter into `result` how far the resumed run lies from the `expected` one, and what is wrong with it.

    Where it must be exact, all numbers of the whole run are compared; else the resumed run has made the steps
    after
    `result.resumed_from` alone, and may round them differently.
    """
    exact = result.must_be_exact
    after_step = 0 if exact else result.resumed_from
    steps = training_steps(actual)
    result.compared_steps = sum(step > result.resumed_from for step in steps)
    wrong = describe_wrong_steps([step for step in training_steps(expected) if step > after_step], steps)
    if exact:
        wrong = wrong or describe_unpaired(expected, actual)
    if wrong:
        result.problems.append(wrong)
    numbers = pair_numbers(expected, actual, after_step)
    losses_and_norms = [number for number in numbers if number.name.startswith(("loss", "grad_norm"))]
    result.max_deviation = max(
        (number.deviation for number in losses_and_norms if number.step > result.resumed_from),
        default=math.inf,
    )
    tolerance = 0.0 if exact else TOLERANCES[precision].loss
    too_far = [n for n in (numbers if exact else losses_and_norms) if n.deviation > tolerance]
    if too_far:
        result.problems.append(describe_first(too_far[0], losses_and_norms, result))


def describe_first(first: NumberPair, numbers: Sequence[NumberPair], result: ResumeResult) -> str:
    """The message about the first number that is too far off; `numbers` are the losses and gradient norms."""
    if first.step <= result.resumed_from:
        return (
            f"{first}, before it was killed: this run does not repeat itself on this machine, resumed or not"
        )
    if result.must_be_exact:
        return f"{first}, the first to differ"
    steps = sorted({number.step for number in numbers})
    by_step = [max(number.deviation for number in numbers if number.step == step) for step in steps]
    first_bad = steps.index(first.step)
    growth = describe_growth(by_step, first_bad, compare=2 * first_bad)
    return f"{first}, the first to differ by too much{growth}"
