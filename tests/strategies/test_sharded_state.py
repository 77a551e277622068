"""One state for all strategies: what any of them saves at any world size, any other takes up."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategies.training import Case, Outcome, Saved, assert_equal, raw, train

# the running statistics of BatchNorm are the loop's to average, so not here; three steps, then three more
FIRST = Case(model="scalar", micro_batches=4, steps=3)
PLACES = [("single", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 4), ("fsdp-grad", 2), ("fsdp-hybrid", 4)]
ZERO = [(name, ranks) for name in ("zero1", "zero2", "zero3") for ranks in (2, 4)]
QUICK = [("single", 1), ("ddp", 2), ("fsdp", 4), ("fsdp-hybrid", 4), ("zero2", 2), ("zero3", 2)]
RING = [
    pytest.param(place, id=f"{place[0]}-{place[1]}", marks=[] if place in QUICK else [pytest.mark.slow])
    for place in PLACES + ZERO
]


@cache
def written(strategy: str, ranks: int, case: Case) -> tuple[Outcome, Saved]:
    outcomes = run_ranks(ranks, train, strategy, case)
    return outcomes[0], Saved([outcome.state for outcome in outcomes])


def check_saved(strategy: str, ranks: int, case: Case) -> None:
    """The ranges cover each tensor once (Saved checks that) and hold the same as one process would save."""
    _, saved = written(strategy, ranks, case)
    _, expected = written("single", 1, case)
    assert saved.shapes == expected.shapes
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(saved.tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def check_resumed(writer: tuple[str, int], reader: tuple[str, int], case: Case) -> None:
    _, saved = written(*writer, case)
    rest = replace(case, first_step=case.steps)
    whole = raw(replace(case, steps=2 * case.steps))
    expected = Outcome(whole.losses[case.steps :], whole.norms[case.steps :], whole.weights)
    assert_equal(run_ranks(reader[1], train, reader[0], rest, saved)[0], expected)


@pytest.mark.parametrize("place", RING)
def test_state_covers_each_tensor_once(place: tuple[str, int]) -> None:
    check_saved(*place, FIRST)


@pytest.mark.parametrize("place", RING)
def test_training_goes_on_under_another_strategy(place: tuple[str, int]) -> None:
    # a ring: each place reads what its neighbour wrote, and single what it wrote
    ring = PLACES + ZERO
    check_resumed(ring[ring.index(place) - 1], place, FIRST)
    check_resumed(place, ("single", 1), FIRST)
