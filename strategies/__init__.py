"""How a model is spread over ranks: a single device, DDP, FSDP2 or DeepSpeed ZeRO behind one interface.

README.md in this folder says which strategy to take when, and how to add one. Importing this package imports
no torch: `--help` and a mistake in the command line answer at once.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from strategies.base import Strategy


class StrategyInfo(NamedTuple):
    """What `strategy=NAME` stands for."""

    class_path: str
    """MODULE:CLASS, imported when it is needed"""
    options_group: str | None = None
    """the group of keys (`ddp.*`, a field of `options.Options`) that has an effect under this strategy"""
    package: str | None = None
    """a package that must be installed beside torch"""


STRATEGIES = {
    "single": StrategyInfo("strategies.base:Strategy"),
    "ddp": StrategyInfo("strategies.ddp:DDP", "ddp"),
    "fsdp": StrategyInfo("strategies.fsdp:FSDP", "fsdp"),
    "zero1": StrategyInfo("strategies.zero:Zero", "zero", "deepspeed"),
    "zero2": StrategyInfo("strategies.zero:Zero", "zero", "deepspeed"),
    "zero3": StrategyInfo("strategies.zero:Zero", "zero", "deepspeed"),
}
"""every strategy by its name: the one table that all lists of strategies and of their options derive from"""

OPTIONS_GROUPS = tuple(
    dict.fromkeys(info.options_group for info in STRATEGIES.values() if info.options_group is not None)
)
"""the groups of keys that have an effect under some strategies only"""


def strategy_class(name: str) -> type[Strategy]:
    """The class behind a strategy's name; imports what that strategy needs and nothing else."""
    module, _, attribute = STRATEGIES[name].class_path.partition(":")
    strategy: type[Strategy] = getattr(import_module(module), attribute)
    return strategy


def strategies_with(options_group: str) -> list[str]:
    """The names of the strategies under which the keys of `options_group` have an effect."""
    return [name for name, info in STRATEGIES.items() if info.options_group == options_group]


def missing_package(name: str) -> str | None:
    """The package that strategy `name` needs and that is not installed; None if nothing is missing."""
    package = STRATEGIES[name].package
    return package if package is not None and importlib.util.find_spec(package) is None else None
