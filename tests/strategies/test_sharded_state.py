"""One state for all strategies: what any of them saves at any world size, any other takes up."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategies.training import Case, InMemoryCheckpoint, Outcome, assert_equal, raw_pytorch, train

# the running statistics of BatchNorm are the loop's to average, so not here; three steps, then three more
FIRST = Case(model="scalar", micro_batches=4, steps=3)
SETUPS = [("single", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 4), ("fsdp-grad", 2), ("fsdp-hybrid", 4)]
ZERO = [(name, ranks) for name in ("zero1", "zero2", "zero3") for ranks in (2, 4)]
QUICK = [("single", 1), ("ddp", 2), ("fsdp", 4), ("fsdp-hybrid", 4), ("zero2", 2), ("zero3", 2)]
RING = [
    pytest.param(setup, id=f"{setup[0]}-{setup[1]}", marks=[] if setup in QUICK else [pytest.mark.slow])
    for setup in SETUPS + ZERO
]


@cache
def saved_by(strategy: str, ranks: int, case: Case) -> tuple[Outcome, InMemoryCheckpoint]:
    outcomes = run_ranks(ranks, train, strategy, case)
    return outcomes[0], InMemoryCheckpoint([outcome.state for outcome in outcomes])


def check_saved(strategy: str, ranks: int, case: Case) -> None:
    """The slices cover each tensor once (InMemoryCheckpoint checks that) and hold what one process saves."""
    _, saved = saved_by(strategy, ranks, case)
    _, expected = saved_by("single", 1, case)
    assert saved.shapes == expected.shapes
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(saved.tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def check_resumed(writer: tuple[str, int], reader: tuple[str, int], case: Case) -> None:
    _, saved = saved_by(*writer, case)
    rest = replace(case, first_step=case.steps)
    whole = raw_pytorch(replace(case, steps=2 * case.steps))
    expected = Outcome(whole.losses[case.steps :], whole.norms[case.steps :], whole.weights)
    assert_equal(run_ranks(reader[1], train, reader[0], rest, saved)[0], expected)


@pytest.mark.parametrize("setup", RING)
def test_state_covers_each_tensor_once(setup: tuple[str, int]) -> None:
    check_saved(*setup, FIRST)


@pytest.mark.parametrize("setup", RING)
def test_training_goes_on_under_another_strategy(setup: tuple[str, int]) -> None:
    # a ring: each setup reads what its neighbor wrote, and single what it wrote
    ring = SETUPS + ZERO
    check_resumed(ring[ring.index(setup) - 1], setup, FIRST)
    check_resumed(setup, ("single", 1), FIRST)
