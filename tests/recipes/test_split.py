from __future__ import annotations

from itertools import chain

import pytest

from recipes.parts.data import Dataset
from recipes.parts.split import holdout, split


def members(view: Dataset | None) -> list[int]:
    return [] if view is None else [view[i] for i in range(len(view))]


@pytest.mark.parametrize("size", [10, 97, 1797])
@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.25, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_views_are_disjoint_and_cover_the_data(size: int, val: float, test: float) -> None:
    splits = split(range(size), val, test)
    parts = [members(part) for part in (splits.train, splits.val, splits.test)]
    assert sorted(chain(*parts)) == list(range(size))
    assert [len(part) for part in parts[1:]] == [round(size * val), round(size * test)]
    assert (splits.val is None) == (val == 0)
    assert (splits.test is None) == (test == 0)


def test_the_split_is_a_function_of_its_seed() -> None:
    first, again, other = (split(range(1000), seed=seed) for seed in (3, 3, 4))
    assert members(first.test) == members(again.test)
    assert set(members(first.test)) != set(members(other.test))


def test_what_is_held_out_is_drawn_from_everywhere() -> None:
    test = members(split(range(10_000)).test)
    assert abs(sum(test) / len(test) - 5000) < 300


def test_held_out_views_read_the_plain_data() -> None:
    splits = split(range(100), plain=range(1000, 1100))
    assert max(members(splits.train)) < 100
    assert min(members(splits.val) + members(splits.test)) >= 1000
    parts = members(splits.train) + [i - 1000 for i in members(splits.val) + members(splits.test)]
    assert sorted(parts) == list(range(100))


def test_holdout_gives_the_rest_and_the_held() -> None:
    rest, held = holdout(range(50), 0.2, seed=1)
    assert len(members(held)) == 10
    assert sorted(members(rest) + members(held)) == list(range(50))
    assert holdout(range(50), 0.0)[1] is None


def test_a_view_ends() -> None:
    train = split(range(10)).train
    with pytest.raises(IndexError, match="sample 8 of 8"):
        train[8]
    with pytest.raises(IndexError):
        train[-1]


def test_a_huge_set_costs_nothing() -> None:
    splits = split(range(10**12))
    assert len(splits.train) == 8 * 10**11
    assert 0 <= splits.train[123_456_789] < 10**12


@pytest.mark.parametrize(
    ("val", "test", "size", "message"),
    [
        (1.0, 0.1, 100, "val=1.0"),
        (-0.1, 0.1, 100, "val=-0.1"),
        (0.1, 0.01, 20, "test=0.01 of 20 samples is none"),
        (0.5, 0.5, 100, "leave none for training"),
    ],
)
def test_fractions_that_cannot_be_are_refused(val: float, test: float, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(range(size), val, test)
