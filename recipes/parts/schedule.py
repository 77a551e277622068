"""Learning-rate schedules in optimizer steps, as one multiplier of each parameter group's own learning rate.

A schedule is a function of the step, not an object with a history: a resumed run needs nothing restored. The
one exception, reduce-on-plateau, keeps its few numbers in `Plateau`. The formulas are those of
`torch.optim.lr_scheduler`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from recipes.parts.option_types import (
    NonNegativeFloat,
    NonNegativeInt,
    OptionGroup,
    PositiveFloat,
    ZeroToOne,
    refuse_unused,
)

USED_BY = {
    "gamma": ("step", "multistep", "plateau"),
    "step_size": ("step",),
    "milestones": ("multistep",),
    "min_factor": ("cosine", "plateau"),
    "pct_start": ("onecycle",),
    "div_factor": ("onecycle",),
    "final_div_factor": ("onecycle",),
    "patience": ("plateau",),
    "threshold": ("plateau",),
    "cooldown": ("plateau",),
}


@dataclass(kw_only=True)
class Schedule(OptionGroup):
    """`schedule.*`: lengths are optimizer steps, or below 1 a fraction of the run, so that they survive
    another `epochs`.
    """

    name: Literal["constant", "step", "multistep", "cosine", "onecycle", "noam", "plateau"] = "constant"
    """how the learning rate moves after the warm-up"""
    warmup: NonNegativeFloat = 0
    """linear warm-up in front of it: steps, or a fraction (< 1) of the run"""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.1
    """step, multistep, plateau: factor of each decay"""
    step_size: NonNegativeFloat = 0
    """step: decay every so many steps, or fraction (< 1) of the run"""
    milestones: tuple[PositiveFloat, ...] = ()
    """multistep: decay at these steps, or fractions (< 1), of the run; warm-up steps count"""
    min_factor: ZeroToOne = 0.0
    """cosine, plateau: the lowest multiplier of the learning rate"""
    pct_start: ZeroToOne = 0.3
    """onecycle: the fraction of the steps after the warm-up in which the learning rate rises"""
    div_factor: Annotated[float, Ge(1)] = 25.0
    """onecycle: it starts at the learning rate divided by this"""
    final_div_factor: Annotated[float, Ge(1)] = 1e4
    """onecycle: it ends at that start divided by this"""
    patience: NonNegativeInt = 10
    """plateau: evaluations without improvement before a decay"""
    threshold: NonNegativeFloat = 1e-4
    """plateau: relative change of the objective that counts as an improvement"""
    cooldown: NonNegativeInt = 0
    """plateau: evaluations after a decay in which nothing is counted"""

    def check(self, declared: Schedule | None = None) -> None:
        """Raise ValueError for fields that do not go together; `declared` holds the recipe's defaults."""
        refuse_unused("schedule", self, declared or Schedule(), USED_BY)
        if self.name == "noam" and self.warmup == 0:
            raise ValueError(
                "schedule.name=noam decays from the end of its warm-up: "
                "give schedule.warmup, e.g. 4000 or 0.1"
            )
        if self.name == "step" and not self.step_size > 0:
            raise ValueError(
                f"schedule.step_size={self.step_size}: "
                "schedule.name=step needs steps (1, 2, ...) or a fraction below 1"
            )
        if self.name == "multistep" and not self.milestones:
            raise ValueError(
                "schedule.name=multistep needs schedule.milestones, "
                "e.g. [1000, 2000] (steps) or [0.5, 0.8] (of the run)"
            )
        if self.name == "plateau" and self.gamma == 1:
            raise ValueError(
                "schedule.gamma=1 with schedule.name=plateau decays nothing: give a factor below 1"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of each group's learning rate at optimizer step `step` (0, 1, ...) of a run of
        `total_steps`.

        Under `plateau` this is the warm-up alone; the loop multiplies by `Plateau.scale`.
        """
        warmup = in_steps(self.warmup, total_steps)
        if step < warmup:
            # the ramp ends where the schedule begins: one-cycle begins low
            return (step + 1) / warmup * (1 / self.div_factor if self.name == "onecycle" else 1.0)
        match self.name:
            case "step":
                return self.gamma ** (step // max(1, in_steps(self.step_size, total_steps)))
            case "multistep":
                return self.gamma ** sum(
                    step >= in_steps(milestone, total_steps) for milestone in self.milestones
                )
            case "cosine":
                return self._cosine(step - warmup, total_steps - warmup)
            case "onecycle":
                return self._onecycle(step - warmup, total_steps - warmup)
            case "noam":
                # Vaswani et al. 2017, section 5.3: d^-0.5 * min(s^-0.5, s * warmup^-1.5), s = 1, 2, ..., over
                # its peak
                return math.sqrt(max(warmup, 1) / (step + 1))
        return 1.0

    def plateau(self) -> Plateau:
        """A fresh state of reduce-on-plateau under these options."""
        return Plateau(self)

    def _cosine(self, step: int, steps: int) -> float:
        """Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts."""
        progress = min(step / max(steps, 1), 1.0)
        return self.min_factor + (1 - self.min_factor) * (1 + math.cos(math.pi * progress)) / 2

    def _onecycle(self, step: int, steps: int) -> float:
        """Smith and Topin 2018, as in torch's OneCycleLR: cosine up to 1 and cosine down, without cycling the
        momentum.
        """
        start = 1 / self.div_factor
        end = start / self.final_div_factor
        peak, last = self.pct_start * steps - 1, steps - 1
        if step < peak:
            return _anneal(start, 1.0, step / peak)
        return _anneal(1.0, end, min((step - peak) / (last - peak), 1.0) if last > peak else 0.0)


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def in_steps(length: float, total_steps: int) -> int:
    """A length given in steps, or below 1 as a fraction of the run, in steps."""
    return round(length * total_steps) if length < 1 else int(length)


class Plateau:
    """Reduce-on-plateau: torch's ReduceLROnPlateau with a relative threshold, fed with one objective an
    evaluation.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.numbers = PlateauNumbers()

    @property
    def scale(self) -> float:
        """What the learning rate is multiplied by."""
        return self.numbers.scale

    def observe(self, value: float, mode: str) -> None:
        """Take one evaluation into account; `mode` is `min` or `max`. NaN is never better."""
        now, schedule = self.numbers, self.schedule
        sign = {"min": -1, "max": 1}[mode]
        # abs(): torch's `best * (1 - threshold)` moves the wrong way when the objective is negative
        gain = (
            math.inf if now.best is None else sign * (value - now.best) - schedule.threshold * abs(now.best)
        )
        if math.isfinite(value) and gain > 0:
            now.best, now.bad = value, 0
        else:
            now.bad += 1
        if now.cooling > 0:
            now.cooling -= 1
            now.bad = 0
        if now.bad > schedule.patience:
            now.scale = max(now.scale * schedule.gamma, schedule.min_factor)
            now.cooling, now.bad = schedule.cooldown, 0

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps: plain numbers."""
        return asdict(self.numbers)

    def load_state(self, state: dict[str, float | int | None]) -> None:
        """Go on from `state()`."""
        self.numbers = PlateauNumbers(**state)  # type: ignore[arg-type]


@dataclass
class PlateauNumbers:
    """What reduce-on-plateau remembers."""

    best: float | None = None
    bad: int = 0
    cooling: int = 0
    scale: float = 1.0
