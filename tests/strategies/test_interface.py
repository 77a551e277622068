"""The interface: eight methods, four attributes, and one table of strategies that everything derives from."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from strategies import OPTIONS_GROUPS, STRATEGIES, missing_package, strategies_with, strategy_class
from strategies.base import Strategy
from strategies.options import Options, StrategyName
from tests.ranks import CpuWorld, run_ranks
from tests.strategies.training import Case, each, set_up

METHODS = {
    "setup",
    "micro_batch",
    "inference",
    "frozen",
    "backward",
    "step",
    "state",
    "load_state",
}
ATTRIBUTES = {"model", "module", "optimizer", "layout"}


def public(names: object) -> set[str]:
    return {name for name in vars(names) if not name.startswith("_")}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_has_the_same_eight_methods(name: str) -> None:
    for kind in strategy_class(name).__mro__[:-1]:
        assert public(kind) - ATTRIBUTES <= METHODS, kind
    assert public(Strategy) - ATTRIBUTES == METHODS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_says_whether_it_is_collective(name: str) -> None:
    assert "ollective" in (getattr(Strategy, name).__doc__ or "")


def attributes(world: CpuWorld, name: str) -> tuple[set[str], int, set[str], dict[str, str]]:
    strategy = set_up(world, name, Case(model="gpt"))
    layout = strategy.layout
    return public(strategy), layout.num_parameters, set(layout.shapes), layout.tied


@pytest.mark.parametrize("name", each())
def test_four_attributes_and_the_layout_of_the_whole(name: str) -> None:
    world_size = {"single": 1, "fsdp-hybrid": 4}.get(name, 2)
    (expected,) = run_ranks(1, attributes, "single")
    for found in run_ranks(world_size, attributes, name):
        assert found == expected
    assert expected[0] == ATTRIBUTES
    assert expected[3] == {"head.weight": "embedding.weight"}


def test_all_lists_of_strategies_derive_from_the_table() -> None:
    assert get_args(StrategyName) == tuple(STRATEGIES)  # a Literal, for pydantic and mypy
    assert set(OPTIONS_GROUPS) <= {field.name for field in fields(Options)}
    assert strategies_with("zero") == ["zero1", "zero2", "zero3"]
    assert missing_package("single") is None
