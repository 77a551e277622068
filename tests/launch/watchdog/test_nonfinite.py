"""The first parameter that is not finite is named, whichever rank holds the number."""

from __future__ import annotations

import math

import pytest

from launch.watchdog.nonfinite import first_nonfinite_parameter
from tests.launch.runs import make_run
from tests.ranks import CpuWorld, run_ranks


def named(world: CpuWorld, strategy: str, last: bool) -> tuple[str | None, str | None]:
    """What is named in a sound model, and with NaN in the first or last element of its last weight."""
    run = make_run(world, "Fit", "steps=1", "batch_size=4", f"strategy={strategy}")
    sound = first_nonfinite_parameter(run.strategies)
    (held,) = run.strategies.values()
    weight = [parameter for parameter in held.module.parameters() if parameter.ndim == 2][-1]
    shard = held._shard_of(weight)
    position = (math.prod(shard.shape) - 1 if last else 0) - shard.start
    if 0 <= position < shard.values.numel():
        shard.values.view(-1)[position] = math.nan
    return sound, first_nonfinite_parameter(run.strategies)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_it_is_named_on_all_ranks(strategy: str, ranks: int, last: bool) -> None:
    answers = run_ranks(ranks, named, strategy, last)
    assert len(set(answers)) == 1
    assert answers[0][0] is None
    assert answers[0][1] is not None
    assert answers[0][1].endswith(".weight")
