"""The step and phase of this rank: what the watchdog compares between ranks, and a failure report names. No
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Phase:
    """The step and the phase of this rank: start, data, forward, backward, step, evaluate, save, export,
    end.
    """

    step: int = 0
    """the optimizer step that is being made, from 1"""
    name: str = "start"
    ticks: int = 0
    """signs of progress so far: a rank that makes none hangs, whatever it does"""
    batches: list[Any] = field(default_factory=list)
    """this rank's micro-batches of the step"""
    on_enter: Callable[[str], object] | None = None
    """called with the name of each phase as it begins: fault injection"""

    def enter(self, name: str) -> None:
        """Begin the phase `name`. Costs a tenth of a microsecond."""
        self.name = name
        self.ticks += 1
        if self.on_enter is not None:
            self.on_enter(name)

    def tick(self, *_: object) -> None:
        """It takes long, but there is progress: bytes are written, a file is read."""
        self.ticks += 1
