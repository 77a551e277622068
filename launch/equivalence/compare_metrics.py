"""Two runs compared by what their metrics.jsonl say, to the last digit. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.equivalence.common import TOLERANCE, growth
from launch.equivalence.subprocesses import Layout
from launch.runtime.files import digest_of

Line = Mapping[str, Any]
"""a line of metrics.jsonl"""
CHANGING = ("step", "samples_per_second", "time")
"""what has no reason to be the same in two runs, as well as `checkpoint/*`: how long things took"""


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A number of which two runs say different things."""

    step: int
    name: str
    expected: float
    found: float
    by: float
    """relative to the expected"""

    def __str__(self) -> str:
        return f"{self.name} of step {self.step} is {self.found!r}, not {self.expected!r} ({self.by:.1e} off)"


def deviation(found: float, expected: float) -> float:
    """How far a number is from the expected, relative to that: 0 only if they are equal, infinite if one
    alone is NaN.
    """
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    by = abs(found - expected) / max(abs(expected), 1e-30)
    return math.inf if math.isnan(by) else by


def steps_of(lines: Iterable[Line]) -> list[int]:
    """The training steps, as they stand there."""
    return [line["step"] for line in lines if "loss" in line]


def numbers_of(lines: Iterable[Line]) -> dict[tuple[int, str], float]:
    """Every number by step and name: losses, norms, learning rates, scores."""
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if isinstance(value, int | float) and name not in CHANGING and not name.startswith("checkpoint/")
    }


def wrong_steps(expected: Iterable[int], found: Iterable[int]) -> str:
    """What is wrong with the steps of a run, in words; empty if they are the expected ones, each once, in
    order.
    """
    wanted, there = list(expected), list(found)
    if wanted == there:
        return ""
    missing, extra = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    repeated = sorted({step for step in there if there.count(step) > 1})
    parts = {"missing": missing, "too many": extra, "made twice": repeated}
    said = [
        f"step {', '.join(map(str, steps[:3]))}{' ...' * (len(steps) > 3)} {what}"
        for what, steps in parts.items()
        if steps
    ]
    return "; ".join(said) or "its steps are out of order"


def compared(expected: Iterable[Line], found: Iterable[Line], since: int = 0) -> list[Apart]:
    """Each number that both runs know of the steps after `since`, in order of steps; those that are equal
    have `by` 0.
    """
    theirs, mine = numbers_of(expected), numbers_of(found)
    return [
        Apart(
            step=step,
            name=name,
            expected=value,
            found=mine[step, name],
            by=deviation(mine[step, name], value),
        )
        for (step, name), value in sorted(theirs.items(), key=lambda item: item[0][0])
        if step > since and (step, name) in mine
    ]


def only_one_knows(expected: Iterable[Line], found: Iterable[Line]) -> str:
    """The first number that only one of the two runs knows of, in words; empty if there is none."""
    theirs, mine = numbers_of(expected), numbers_of(found)
    first = min(theirs.keys() ^ mine.keys(), default=None)
    return f"only one of the two has {first[1]} of step {first[0]}" if first else ""


# verdicts ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Row:
    """How a run that was taken up again compares with the one that was not interrupted."""

    writer: Layout
    reader: Layout
    saving: bool = False
    """killed in the middle of a save"""
    killed: int = 0
    """at which step; 0: not at all"""
    resumed: int = 0
    """from which step"""
    compared: int = 0
    """losses that were made after that"""
    off_by: float = math.inf
    """largest relative deviation of a loss or a gradient norm after that; 0 is bit-equal"""
    same_weights: bool | None = None
    """whether the exported weights are the same bytes; None: not compared"""
    note: str = ""
    """what is worth knowing, and not wrong"""
    news: list[str] = field(default_factory=list)
    """in words, what is wrong; empty if nothing is"""


def judge(row: Row, expected: Sequence[Line], found: Sequence[Line], precision: str) -> None:
    """Enter into `row` how far a run that was taken up lies from the `expected` one, and what is wrong about
    it.

    The same strategy on as many ranks must repeat every number of the whole run; another one has made the
    steps after
    `row.resumed` alone, and may round them differently.
    """
    exact = row.reader == row.writer
    since = 0 if exact else row.resumed
    made = steps_of(found)
    row.compared = sum(step > row.resumed for step in made)
    wrong = wrong_steps([step for step in steps_of(expected) if step > since], made)
    if wrong or (exact and (wrong := only_one_knows(expected, found))):
        row.news.append(wrong)
    numbers = compared(expected, found, since)
    allowed = 0.0 if exact else TOLERANCE[precision][0]
    curve = [number for number in numbers if number.name.startswith(("loss", "grad_norm"))]
    row.off_by = max((number.by for number in curve if number.step > row.resumed), default=math.inf)
    bad = [number for number in (numbers if exact else curve) if number.by > allowed]
    if not bad:
        return
    first = bad[0]
    if first.step <= row.resumed:
        row.news.append(
            f"{first}, before it was killed: this run does not repeat itself on this machine, resumed or not"
        )
        return
    steps = sorted({number.step for number in curve})
    by_step = [max(number.by for number in curve if number.step == step) for step in steps]
    sensitive = "" if exact else growth(by_step, steps.index(first.step), compare=2 * steps.index(first.step))
    row.news.append(f"{first}, the first to differ{'' if exact else ' by too much'}{sensitive}")


def same_files(whole: Path, other: Path) -> bool:
    """Whether two runs exported the same weights, in as many files."""
    one, two = (
        {path.name: digest_of(path) for path in folder.glob("model*.safetensors")}
        for folder in (whole, other)
    )
    return bool(one) and one == two
