"""Two runs compared by their metrics.jsonl, to the last digit. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.equivalence.tolerances import relative_deviation
from launch.runtime.files import digest_of

MetricsLine = Mapping[str, Any]
"""a line of metrics.jsonl"""
NOT_COMPARED = ("step", "samples_per_second", "time")
"""the key of the line, and measured times, which differ in two runs; as do those of `checkpoint/*`"""
MAX_STEPS_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class NumberPair:
    """The same number of the same step in two runs."""

    step: int
    name: str
    expected: float
    actual: float

    @property
    def deviation(self) -> float:
        """Relative to the expected number; 0 if they are equal."""
        return relative_deviation(self.actual, self.expected)

    def __str__(self) -> str:
        return (
            f"{self.name} of step {self.step} is {self.actual!r}, not {self.expected!r} "
            f"({self.deviation:.1e} off)"
        )


def training_steps(lines: Iterable[MetricsLine]) -> list[int]:
    """The training steps, in the order of the lines."""
    return [line["step"] for line in lines if "loss" in line]


def numbers_by_step(lines: Iterable[MetricsLine]) -> dict[tuple[int, str], float]:
    """Every number by step and name: losses, norms, learning rates, evaluation metrics."""
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if isinstance(value, int | float) and name not in NOT_COMPARED and not name.startswith("checkpoint/")
    }


def describe_wrong_steps(expected: Iterable[int], actual: Iterable[int]) -> str:
    """What is wrong with the steps of a run; empty if they are the expected ones, each once, in order."""
    wanted, made = list(expected), list(actual)
    if wanted == made:
        return ""
    problems = {
        "missing": sorted(set(wanted) - set(made)),
        "too many": sorted(set(made) - set(wanted)),
        "made twice": sorted({step for step in made if made.count(step) > 1}),
    }
    messages = []
    for problem, steps in problems.items():
        if steps:
            more = " ..." if len(steps) > MAX_STEPS_NAMED else ""
            messages.append(f"step {', '.join(map(str, steps[:MAX_STEPS_NAMED]))}{more} {problem}")
    return "; ".join(messages) or "its steps are out of order"


def pair_numbers(
    expected: Iterable[MetricsLine], actual: Iterable[MetricsLine], after_step: int = 0
) -> list[NumberPair]:
    """Each number that both runs logged for the steps after `after_step`, in order of steps."""
    expected_numbers, actual_numbers = numbers_by_step(expected), numbers_by_step(actual)
    return [
        NumberPair(step=step, name=name, expected=value, actual=actual_numbers[step, name])
        for (step, name), value in sorted(expected_numbers.items(), key=lambda item: item[0][0])
        if step > after_step and (step, name) in actual_numbers
    ]


def describe_unpaired(expected: Iterable[MetricsLine], actual: Iterable[MetricsLine]) -> str:
    """The first number that only one of the two runs logged; empty if there is none."""
    unpaired = numbers_by_step(expected).keys() ^ numbers_by_step(actual).keys()
    first = min(unpaired, default=None)
    return f"only one of the two has {first[1]} of step {first[0]}" if first else ""


def same_weights(one: Path, other: Path) -> bool:
    """Whether two run directories hold the same exported weights, byte by byte, in as many files."""
    digests = [
        {path.name: digest_of(path) for path in run_dir.glob("model*.safetensors")}
        for run_dir in (one, other)
    ]
    return bool(digests[0]) and digests[0] == digests[1]
