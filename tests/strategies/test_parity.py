"""Every strategy trains as raw PyTorch does on one process."""

from __future__ import annotations

from functools import cache

import pytest
from _pytest.mark import ParameterSet

from tests.ranks import run_ranks
from tests.strategies.training import STRATEGIES, Case, Outcome, assert_equal, each, raw_pytorch, train

TWO_RANKS = [name for name in STRATEGIES if name != "fsdp-hybrid"]

CASES = {
    "mlp": Case(),
    "mlp-sgd-accumulating": Case(optimizer="sgd", micro_batches=8),
    "cnn": Case(model="cnn", micro_batches=4),
    "gpt": Case(model="gpt"),
    "gpt-clip-norm": Case(model="gpt", micro_batches=4, options=(("clip_norm", 0.5),)),
    "clip-value": Case(optimizer="sgd", options=(("clip_value", 0.01),)),
    "clip-both": Case(optimizer="sgd", micro_batches=4, options=(("clip_norm", 0.1), ("clip_value", 0.01))),
    "frozen": Case(model="frozen", micro_batches=4),
    "scalar": Case(model="scalar", micro_batches=4, options=(("clip_norm", 0.5),)),
    "tied-blocks": Case(model="tied-blocks"),
    "checkpointing": Case(model="cnn", micro_batches=4, options=(("activation_checkpointing", True),)),
    "checkpointing-gpt": Case(model="gpt", micro_batches=4, options=(("activation_checkpointing", True),)),
}


def pairs() -> list[ParameterSet]:
    """Every case under DDP and FSDP; under the others the quick ones are those with the most in them."""
    quick = {"mlp-sgd-accumulating", "cnn", "gpt-clip-norm"}
    return [
        pytest.param(*parameter.values, case, id=f"{parameter.id}-{name}", marks=marks)
        for parameter in each(TWO_RANKS, ("ddp", "fsdp", "single", "zero1", "zero3"))
        for name, case in CASES.items()
        for marks in [
            parameter.marks
            or ([] if parameter.id in ("ddp", "fsdp") or name in quick else [pytest.mark.slow])
        ]
    ]


@cache
def trained(strategy: str, case: Case) -> list[Outcome]:
    """On two ranks, `single` on one."""
    return run_ranks(1 if strategy == "single" else 2, train, strategy, case)


@pytest.mark.parametrize(("strategy", "case"), pairs())
def test_two_ranks_equal_raw_pytorch(strategy: str, case: Case) -> None:
    outcomes = trained(strategy, case)
    assert_equal(outcomes[0], raw_pytorch(case))
    assert all(
        outcome.losses == outcomes[0].losses and outcome.norms == outcomes[0].norms for outcome in outcomes
    )


@pytest.mark.parametrize("strategy", each([n for n in STRATEGIES if n != "single"], ("ddp", "fsdp-hybrid")))
def test_four_ranks_equal_raw_pytorch(strategy: str) -> None:
    case = Case(model="gpt", micro_batches=8, options=(("clip_norm", 0.5),))
    assert_equal(run_ranks(4, train, strategy, case)[0], raw_pytorch(case))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp-hybrid"])
def test_scalars_and_short_parameters_on_four_ranks(strategy: str) -> None:
    case = Case(model="scalar", micro_batches=8, options=(("clip_norm", 0.5),))
    assert_equal(run_ranks(4, train, strategy, case)[0], raw_pytorch(case))


def test_strategies_agree_among_each_other() -> None:
    for case in (CASES["gpt-clip-norm"], CASES["cnn"]):
        expected = trained("single", case)[0]
        for strategy in ("ddp", "fsdp", "zero1", "zero3"):
            assert_equal(trained(strategy, case)[0], expected, 1e-6, 2e-6)
