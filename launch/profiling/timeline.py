"""What ran when, as intervals on one clock: how much of a window was compute, and how much was exposed
communication. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["compute", "communication", "copies"]
Interval = tuple[float, float]
"""start and end"""


class TimeBreakdown(NamedTuple):
    """How a window was used, in the unit of its clock. `compute`, `exposed_communication`, `exposed_copies`
    and
    `idle` add up to it.
    """

    compute: float
    communication: float
    """all of it"""
    exposed_communication: float
    """with no compute at the same time"""
    copies: float
    exposed_copies: float
    """with neither compute nor communication at the same time"""
    idle: float
    """nothing at all"""


def break_down(activities: Iterable[tuple[float, float, Kind]], begin: float, end: float) -> TimeBreakdown:
    """How the window from `begin` to `end` was used by `activities`: (start, end, kind), in any order, which
    may overlap.
    """
    intervals: dict[Kind, list[Interval]] = {"compute": [], "communication": [], "copies": []}
    for start, stop, kind in activities:
        intervals[kind].append((max(start, begin), min(stop, end)))
    compute, communication, copies = map(union, intervals.values())
    working = union([*compute, *communication])
    return TimeBreakdown(
        compute=total_length(compute),
        communication=total_length(communication),
        exposed_communication=total_length(subtract(communication, compute)),
        copies=total_length(copies),
        exposed_copies=total_length(subtract(copies, working)),
        idle=end - begin - total_length(union([*working, *copies])),
    )


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals in order, with gaps between them; empty ones are left out."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """The moments of `intervals` that are not of `others`; both as `union` returns them."""
    rest: list[Interval] = []
    first = 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        index = first
        while index < len(others) and others[index][0] < end:
            rest.append((start, others[index][0]))
            start = others[index][1]
            index += 1
        rest.append((start, end))
    return union(rest)


def total_length(intervals: list[Interval]) -> float:
    """The sum of the lengths of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)
