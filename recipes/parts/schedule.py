"""Learning-rate schedules in optimizer steps, as one multiplier of each parameter group's own learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Schedule:
    """`schedule.*`"""

    name: Literal["constant", "step", "multistep", "cosine", "onecycle", "noam", "plateau"] = "constant"
    """how the learning rate moves"""
    warmup: int = 0
    """steps of linear warm-up in front of it"""
