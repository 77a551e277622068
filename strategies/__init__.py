"""How a model is spread over ranks. Importing this package imports no torch: `--help` and a wrong key answer
at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.base import Strategy

STRATEGIES = {
    "single": "strategies.base:Strategy",
    "ddp": "strategies.ddp:DDP",
    "fsdp": "strategies.fsdp:FSDP",
    "zero1": "strategies.zero:Zero",
    "zero2": "strategies.zero:Zero",
    "zero3": "strategies.zero:Zero",
}


def strategy_class(name: str) -> type[Strategy]:
    """The class behind a strategy's name; imports what that strategy needs and nothing else."""
    module, _, attribute = STRATEGIES[name].partition(":")
    found: type[Strategy] = getattr(import_module(module), attribute)
    return found
