"""Each schedule against torch's, the formula of the paper where torch has none."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from recipes.parts.schedule import Plateau, Schedule
from tests.recipes.checking import check_options

LR = 0.3


def rates_of_torch(build: Callable[[Optimizer], LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = build(optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR steps in a way that it deprecates itself
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return rates


def rates_of(schedule: Schedule, steps: int) -> list[float]:
    schedule.check()
    return [LR * schedule.factor(step, steps) for step in range(steps)]


def after_warmup(
    warmup: int, build: Callable[[Optimizer], LRScheduler]
) -> Callable[[Optimizer], LRScheduler]:
    """torch's own way of putting a linear warm-up in front: `warmup` steps, the last of them at the full
    rate.
    """

    def sequence(optimizer: Optimizer) -> LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        return lr_scheduler.SequentialLR(optimizer, [rise, build(optimizer)], milestones=[warmup])

    return sequence


STEPS = 60
AFTER = STEPS - 12

PAIRS: dict[str, tuple[Schedule, Callable[[Optimizer], LRScheduler]]] = {
    "constant": (Schedule(), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "step": (Schedule(name="step", step_size=7, gamma=0.5), lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "step, fraction": (Schedule(name="step", step_size=0.25), lambda o: lr_scheduler.StepLR(o, 15)),
    "multistep": (
        Schedule(name="multistep", milestones=(20, 45)),
        lambda o: lr_scheduler.MultiStepLR(o, [20, 45]),
    ),
    "multistep, fractions": (
        Schedule(name="multistep", milestones=(0.5, 0.75)),
        lambda o: lr_scheduler.MultiStepLR(o, [30, 45]),
    ),
    "cosine": (Schedule(name="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "cosine, floor": (
        Schedule(name="cosine", min_factor=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1 * LR),
    ),
    "onecycle": (Schedule(name="onecycle"), lambda o: lr_scheduler.OneCycleLR(o, LR, STEPS)),
    "onecycle, other": (
        Schedule(name="onecycle", pct_start=0.2, div_factor=10, final_div_factor=100),
        lambda o: lr_scheduler.OneCycleLR(o, LR, STEPS, pct_start=0.2, div_factor=10, final_div_factor=100),
    ),
    "warm-up, constant": (Schedule(warmup=12), after_warmup(12, lambda o: lr_scheduler.ConstantLR(o, 1.0))),
    "warm-up as a fraction": (
        Schedule(warmup=0.2),
        after_warmup(12, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    ),
    "warm-up, cosine": (
        Schedule(name="cosine", warmup=12),
        after_warmup(12, lambda o: lr_scheduler.CosineAnnealingLR(o, AFTER)),
    ),
    # milestones are steps of the run; those of a sequence count from its turn
    "warm-up, multistep": (
        Schedule(name="multistep", warmup=12, milestones=(20, 45)),
        after_warmup(12, lambda o: lr_scheduler.MultiStepLR(o, [8, 33])),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_torchs(name: str) -> None:
    schedule, build = PAIRS[name]
    assert rates_of(schedule, STEPS) == pytest.approx(rates_of_torch(build, STEPS), rel=1e-9, abs=1e-12)


def test_warmup_in_front_of_onecycle_rises_to_where_it_begins() -> None:
    rates = rates_of(Schedule(name="onecycle", warmup=12), STEPS)
    cycle = rates_of_torch(lambda o: lr_scheduler.OneCycleLR(o, LR, AFTER), AFTER)
    assert rates[12:] == pytest.approx(cycle)
    assert rates[:12] == pytest.approx([cycle[0] * (step + 1) / 12 for step in range(12)])


def test_warmup_in_front_of_step_keeps_the_steps_of_the_run() -> None:
    rates = rates_of(Schedule(name="step", step_size=20, warmup=10), STEPS)
    assert rates[:10] == pytest.approx([LR * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([LR * 0.1 ** (step // 20) for step in range(10, STEPS)])


@pytest.mark.parametrize("warmup", [1, 10, 0.25])
def test_noam_is_the_papers_over_its_peak(warmup: float) -> None:
    steps, width = 80, 512
    peak_step = int(warmup) if warmup >= 1 else round(warmup * steps)
    paper = [width**-0.5 * min(s**-0.5, s * peak_step**-1.5) for s in range(1, steps + 1)]
    rates = rates_of(Schedule(name="noam", warmup=warmup), steps)
    assert rates == pytest.approx([LR * rate / max(paper) for rate in paper])
    assert max(rates) == pytest.approx(LR)


@pytest.mark.parametrize("name", ["constant", "cosine", "onecycle", "noam", "step", "multistep", "plateau"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_may_be_short_and_a_step_beyond_its_end(name: str, steps: int) -> None:
    schedule = Schedule(name=name, warmup=1, step_size=1, milestones=(1,))  # type: ignore[arg-type]
    for step in range(steps + 3):
        assert 0 <= schedule.factor(step, steps) <= 1


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_plateau_is_torchs(mode: Any, cooldown: int) -> None:
    random.seed(0)
    values = [random.uniform(0.5, 1.5) for _ in range(200)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    reference = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.5, patience=3, threshold=0.01, cooldown=cooldown, min_lr=0.01 * LR, eps=0
    )
    schedule = Schedule(
        name="plateau", gamma=0.5, patience=3, threshold=0.01, cooldown=cooldown, min_factor=0.01
    )
    schedule.check()
    plateau = schedule.plateau()
    scales = []
    for value in values:
        reference.step(value)
        plateau.observe(value, mode)
        scales.append(plateau.scale)
        assert LR * plateau.scale == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(scales)) > 4


def test_plateau_goes_on_from_its_state() -> None:
    schedule = Schedule(name="plateau", patience=2, cooldown=1)
    values = [3.0, 2.0, 2.5, 2.4, 2.6, 2.7, 2.1, 2.2, 2.3, 2.4, math.nan, 2.0]

    def observed(plateau: Plateau, values: list[float]) -> Plateau:
        for value in values:
            plateau.observe(value, "min")
        return plateau

    whole = observed(schedule.plateau(), values).state()
    for cut in range(len(values)):
        saved = json.dumps(observed(schedule.plateau(), values[:cut]).state())
        resumed = schedule.plateau()
        resumed.load_state(json.loads(saved))
        assert observed(resumed, values[cut:]).state() == whole


def test_plateau_understands_negative_objectives_and_nan() -> None:
    plateau = Schedule(name="plateau", patience=0).plateau()
    for value in (math.nan, -1.0, -2.0, -3.0):  # each better than the last; the first is none
        plateau.observe(value, "min")
    assert plateau.state() == {"best": -3.0, "bad": 0, "cooling": 0, "scale": pytest.approx(0.1)}
    plateau.observe(-3.0, "min")
    assert plateau.scale == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(name="multistep"), "needs schedule.milestones"),
        (Schedule(name="multistep", milestones=(0, 10)), "each must be greater than 0"),
        (Schedule(name="step"), "schedule.step_size=0"),
        (Schedule(name="noam"), "give schedule.warmup"),
        (Schedule(warmup=-1), "schedule.warmup=-1"),
        (Schedule(warmup=math.nan), "schedule.warmup=nan"),
        (Schedule(name="step", step_size=5, gamma=0), "schedule.gamma=0"),
        (Schedule(name="step", step_size=5, gamma=1.5), "schedule.gamma=1.5"),
        (Schedule(name="cosine", min_factor=2), "schedule.min_factor=2"),
        (Schedule(name="onecycle", pct_start=1.2), "schedule.pct_start=1.2"),
        (Schedule(name="onecycle", div_factor=0.5), "schedule.div_factor=0.5"),
        (Schedule(name="plateau", patience=-1), "schedule.patience=-1"),
        (Schedule(name="cosine", gamma=0.5), "schedule.gamma=0.5 has no effect under schedule.name=cosine"),
        (Schedule(milestones=(5,)), "take schedule.name=multistep"),
        (Schedule(name="step", step_size=5, patience=3), "schedule.patience=3 has no effect"),
    ],
)
def test_nonsense_is_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options("schedule", schedule)


def test_what_the_recipe_declares_is_not_held_against_the_user() -> None:
    declared = Schedule(name="onecycle", pct_start=0.2)
    Schedule(name="cosine", pct_start=0.2).check(declared)
    with pytest.raises(ValueError, match=r"pct_start=0.4 has no effect"):
        Schedule(name="cosine", pct_start=0.4).check(declared)
