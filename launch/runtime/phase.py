"""Where a rank is in its run: what the watch compares between ranks, and a verdict names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Place:
    """The step and the phase that this rank is in: start, data, forward, backward, step, evaluate, save, end."""

    step: int = 0
    """the step that is being made"""
    phase: str = "start"
    moves: int = 0
    """how often it has changed: a rank that makes none is stuck, whatever it does"""
    batches: list[Any] = field(default_factory=list)
    """this rank's micro-batches of the step"""

    def at(self, phase: str) -> None:
        """Go on to `phase`. Costs a tenth of a microsecond."""
        self.phase = phase
        self.moves += 1

    def still_there(self, *_: object) -> None:
        """It takes long, but it goes on: bytes are written, a file is read."""
        self.moves += 1
