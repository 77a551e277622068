"""The first parameter that is not finite is named, whichever rank holds the number."""

from __future__ import annotations

import pytest
import torch

from launch.watchdog.nonfinite import first_nonfinite_parameter
from tests.launch.jobs import job_of
from tests.ranks import CpuWorld, run_ranks


def named(world: CpuWorld, strategy: str, value: float, row: int) -> tuple[str | None, str | None]:
    """What is named in a sound model, and with `value` in one row of its second weight."""
    run = job_of(world, "Fit", "steps=1", "batch_size=4", f"strategy={strategy}")
    sound = first_nonfinite_parameter(run.strategies)
    (held,) = run.strategies.values()
    weights = {name: parameter for name, parameter in held.module.named_parameters() if parameter.ndim == 2}
    with torch.no_grad():
        list(weights.values())[-1][row] = value
    return sound, first_nonfinite_parameter(run.strategies)


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_it_is_named_on_all_ranks(strategy: str, ranks: int, row: int) -> None:
    answers = run_ranks(ranks, named, strategy, float("nan"), row)
    assert len(set(answers)) == 1
    assert answers[0][0] is None
    assert answers[0][1] is not None
    assert answers[0][1].endswith(".weight")
