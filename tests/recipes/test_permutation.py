from __future__ import annotations

from collections import Counter
from math import factorial

import numpy as np
import pytest
from scipy.stats import chisquare

from recipes.parts.permutation import Permutation


def test_every_small_size_is_a_bijection() -> None:
    for size in range(1, 301):
        for seed in range(3):
            order = Permutation(size, seed)(np.arange(size))
            assert sorted(order.tolist()) == list(range(size)), (size, seed)


@pytest.mark.parametrize("size", [10**6 + 3, 2**32, 2**32 + 1, 10**12, 2**62])
def test_a_large_size_sends_different_positions_to_different_places_inside(size: int) -> None:
    permutation = Permutation(size, 1)
    positions = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)])
    order = permutation(positions)
    assert order.min() >= 0
    assert order.max() < size
    assert len(np.unique(order)) == len(positions)
    # no position near the start stays near the start: the mean of uniform values is size / 2, to 1 / sqrt(12
    # n)
    assert abs(order.mean() / size - 0.5) < 5 / np.sqrt(12 * len(positions))


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 10**12])
def test_one_position_and_an_array_agree(size: int) -> None:
    permutation = Permutation(size, 5, 6)
    positions = np.unique(np.linspace(0, size - 1, 100).astype(np.int64))
    assert [permutation[i] for i in positions.tolist()] == permutation(positions).tolist()
    assert permutation(positions[:0]).tolist() == []


def test_each_permutation_of_four_is_as_likely() -> None:
    seen = Counter(tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(6000))
    assert len(seen) == factorial(4)
    assert chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("size", [5, 10, 97])
@pytest.mark.parametrize("position", [0, 3])
def test_a_position_goes_anywhere_with_equal_chance(size: int, position: int) -> None:
    seen = Counter(Permutation(size, 11, epoch)[position] for epoch in range(100 * size))
    assert chisquare([seen[i] for i in range(size)]).pvalue > 1e-3


def test_neighbours_part_with_equal_chance() -> None:
    size = 12
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(50 * size * (size - 1)):
        permutation = Permutation(size, seed)
        seen[permutation[4], permutation[5]] += 1
    pairs = [seen[a, b] for a in range(size) for b in range(size) if a != b]
    assert chisquare(pairs).pvalue > 1e-3


def test_every_part_of_the_key_matters() -> None:
    def order(*key: int) -> list[int]:
        positions: list[int] = Permutation(1000, *key)(np.arange(1000)).tolist()
        return positions

    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,)]
    orders = [order(*key) for key in keys]
    assert len({tuple(o) for o in orders}) == len(keys)
    # unrelated permutations agree in one position on average
    assert all(sum(a == b for a, b in zip(orders[0], other, strict=True)) < 8 for other in orders[1:])


def test_the_order_is_the_same_for_ever() -> None:
    # a resumed run relies on it: a change here needs a new format of checkpoints
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [8, 6, 7, 3, 5, 4, 9, 1, 2, 0]
    assert Permutation(10**12, 7)[123] == 495100668435


def test_it_costs_no_memory() -> None:
    """What it takes in time, tests/benchmarks/data.py measures."""
    assert len(Permutation(10**12, 0, 1).keys) < 10


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size}"):
        Permutation(size, 0)


def test_positions_outside_are_refused() -> None:
    permutation = Permutation(10, 0)
    with pytest.raises(IndexError):
        permutation[10]
    with pytest.raises(IndexError):
        permutation[-1]
    with pytest.raises(IndexError):
        permutation(np.array([3, 10]))
