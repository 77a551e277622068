"""The rows of `gpu.py`, one section a file, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAILED, WRONG, LEFT_OUT = WITHOUT_FIGURE = ("FAILED", "WRONG", "left out")
"""how the note of a row begins that has no figure"""


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Where and how long the rows are measured."""

    device: str
    """`cuda:0`; in a rehearsal `cpu`"""
    rehearse: bool
    """whether the rows are only run through, at toy sizes"""
    seconds: float
    """length of a measured window"""
    rounds: int
    """A B B A of a comparison"""
    mnist: str | None
    """the folder of the MNIST files"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A line of the table, before it is measured."""

    section: str
    name: str
    measure: Callable[[], dict[str, Any]]
    """the values of the columns"""
    aim: str | None = None
