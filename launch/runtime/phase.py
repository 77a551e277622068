"""Where a rank is in its run: what the watch compares between ranks, and a verdict names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Phase:
    """The step and the phase that this rank is in: start, data, forward, backward, step, evaluate, save, end."""

    step: int = 0
    """the step that is being made"""
    name: str = "start"
    ticks: int = 0
    """how often it has changed: a rank that makes none is stuck, whatever it does"""
    batches: list[Any] = field(default_factory=list)
    """this rank's micro-batches of the step"""

    def enter(self, name: str) -> None:
        """Go on to the phase `name`. Costs a tenth of a microsecond."""
        self.name = name
        self.ticks += 1

    def tick(self, *_: object) -> None:
        """It takes long, but it goes on: bytes are written, a file is read."""
        self.ticks += 1
