"""What ran when, as intervals on one clock: how much of a window was computing, and how much nothing but
waiting. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["computing", "communication", "copies"]
Interval = tuple[float, float]
"""start and end"""


class Split(NamedTuple):
    """A window, in the unit of its clock. `computing`, `exposed`, `exposed_copies` and `idle` add up to it."""

    computing: float
    communication: float
    """all of it; what of this is `exposed` has nothing computing at the same time"""
    exposed: float
    copies: float
    exposed_copies: float
    """with neither computing nor communication at the same time"""
    idle: float
    """nothing at all"""


def split(ran: Iterable[tuple[float, float, Kind]], begin: float, end: float) -> Split:
    """How the window from `begin` to `end` was used by what `ran`: (start, end, kind), in any order,
    overlapping as it likes.
    """
    spans: dict[Kind, list[Interval]] = {"computing": [], "communication": [], "copies": []}
    for start, stop, kind in ran:
        spans[kind].append((max(start, begin), min(stop, end)))
    computing, communication, copies = (
        union(spans[kind]) for kind in ("computing", "communication", "copies")
    )
    working = union([*computing, *communication])
    return Split(
        computing=length(computing),
        communication=length(communication),
        exposed=length(minus(communication, computing)),
        copies=length(copies),
        exposed_copies=length(minus(copies, working)),
        idle=end - begin - length(union([*working, *copies])),
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals in order, apart from each other; empty ones are left out."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def minus(these: list[Interval], those: list[Interval]) -> list[Interval]:
    """The moments of `these` that are not of `those`; both as `union` gives them."""
    left: list[Interval] = []
    first = 0
    for start, end in these:
        while first < len(those) and those[first][1] <= start:
            first += 1
        place = first
        while place < len(those) and those[place][0] < end:
            left.append((start, those[place][0]))
            start = those[place][1]
            place += 1
        left.append((start, end))
    return union(left)


def length(intervals: list[Interval]) -> float:
    """Together, of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)
