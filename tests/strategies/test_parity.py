"""Every strategy trains as raw PyTorch does on one process."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategies.models import build
from tests.strategies.training import STRATEGIES, Case, assert_equal, raw, train

QUICK = ["ddp", "fsdp"]
EVERY = [name for name in STRATEGIES if name != "fsdp-hybrid"]

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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("strategy", EVERY)
def test_two_ranks_equal_raw_pytorch(strategy: str, case: Case) -> None:
    ranks = 1 if strategy == "single" else 2
    outcomes = run_ranks(ranks, train, strategy, case)
    assert_equal(outcomes[0], raw(case))
    assert all(outcome.losses == outcomes[0].losses and outcome.norms == outcomes[0].norms for outcome in outcomes)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_four_ranks_equal_raw_pytorch(strategy: str) -> None:
    case = Case(model="gpt", micro_batches=8, options=(("clip_norm", 0.5),))
    assert_equal(run_ranks(4, train, strategy, case)[0], raw(case))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp-hybrid"])
def test_scalars_and_short_parameters_on_four_ranks(strategy: str) -> None:
    case = Case(model="scalar", micro_batches=8, options=(("clip_norm", 0.5),))
    assert_equal(run_ranks(4, train, strategy, case)[0], raw(case))
