"""The frameworks of `overhead.py`, one a file: `run(workload, steps, setting)` trains that many steps, its
own way.

None takes the time by itself: the loss function, which all call once a step, does (`loops.workloads`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks.loops.workloads import Workload

FRAMEWORKS = {
    "rankzero": ("tests.benchmarks.loops.rankzero_loop", "launch"),
    "accelerate": ("tests.benchmarks.loops.accelerate_loop", "accelerate"),
    "fabric": ("tests.benchmarks.loops.fabric_loop", "lightning"),
    "lightning": ("tests.benchmarks.loops.lightning_trainer", "lightning"),
    "hf": ("tests.benchmarks.loops.hf_trainer", "transformers"),
}
"""module, and the package that it needs"""

CLIP_NORM = 1e9
"""of the gradient norm, never reached: all frameworks take the norm and clip, and nothing is clipped"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a framework runs."""

    strategy: str
    """single, ddp, fsdp (FSDP2), zero2, zero3"""
    bare: bool
    """whether what can be left out is: logging, progress, checkpoints, callbacks"""
    rank: int
    ranks: int
    folder: Path
    """an empty one, for what it writes; the same on all ranks"""

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 for the other strategies."""
        return int(self.strategy[4:]) if self.strategy.startswith("zero") else 0


class CannotDo(Exception):
    """The framework has no such strategy; the message says how we know."""


Run = Callable[["Workload", int, Setting], None]


def framework(name: str) -> Run:
    """The function behind a name; imports what it needs and nothing else."""
    run: Run = import_module(
        "tests.benchmarks.loops.raw_strategies" if name == "raw" else FRAMEWORKS[name][0]
    ).run
    return run


def installed(name: str) -> bool:
    """Whether the package of a framework is there."""
    return find_spec(FRAMEWORKS[name][1]) is not None
