"""Intervals on one clock: what is compute, and what is exposed."""

from __future__ import annotations

import random

from launch.profiling.timeline import Kind, TimeBreakdown, break_down, subtract, union


def test_a_union_is_in_order_and_apart() -> None:
    assert union([(5, 6), (1, 3), (2, 4), (4, 5), (8, 8), (9, 7)]) == [(1, 6)]
    assert union([]) == []


def test_what_is_left_of_intervals_without_others() -> None:
    assert subtract([(0, 10)], [(2, 3), (5, 7)]) == [(0, 2), (3, 5), (7, 10)]
    assert subtract([(0, 2), (4, 6), (8, 9)], [(1, 5)]) == [(0, 1), (5, 6), (8, 9)]
    assert subtract([(0, 2), (3, 4)], [(0, 4)]) == []
    assert subtract([(1, 2)], []) == [(1, 2)]


def test_communication_is_exposed_where_nothing_computes() -> None:
    found = break_down(
        [
            (0, 4, "compute"),
            (3, 6, "communication"),
            (5, 7, "communication"),
            (6, 9, "copies"),
            (8, 12, "compute"),
        ],
        0,
        20,
    )
    assert found == TimeBreakdown(
        compute=8, communication=4, exposed_communication=3, copies=3, exposed_copies=1, idle=8
    )


def test_only_the_window_counts() -> None:
    assert break_down(
        [(-5, 1, "compute"), (9, 30, "communication"), (40, 50, "copies")], 0, 10
    ) == TimeBreakdown(1, 1, 1, 0, 0, 8)


def test_any_intervals_are_split_as_one_would_count_them() -> None:
    draw = random.Random(0)
    kinds: list[Kind] = ["compute", "communication", "copies"]
    for _ in range(200):
        ran = [
            (start := draw.randrange(50), start + draw.randrange(12), draw.choice(kinds))
            for _ in range(draw.randrange(15))
        ]
        at = [{kind for start, end, kind in ran if start <= moment < end} for moment in range(10, 45)]
        assert break_down(ran, 10, 45) == TimeBreakdown(
            compute=sum("compute" in busy for busy in at),
            communication=sum("communication" in busy for busy in at),
            exposed_communication=sum("communication" in busy and "compute" not in busy for busy in at),
            copies=sum("copies" in busy for busy in at),
            exposed_copies=sum(busy == {"copies"} for busy in at),
            idle=sum(not busy for busy in at),
        )
