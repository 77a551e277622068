"""Splitting a data set into views: disjoint, covering, the same on all ranks, without lists of indices."""

from __future__ import annotations

from typing import Any

from recipes.parts.data import Dataset, Splits
from recipes.parts.permutation import Permutation


class PermutedView:
    """`length` samples of `dataset` from position `start` of a permutation of it."""

    def __init__(self, dataset: Dataset, permutation: Permutation, start: int, length: int) -> None:
        self.dataset, self.permutation, self.start, self.length = dataset, permutation, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return self.dataset[self.permutation[self.start + index]]


def split(
    dataset: Dataset, val: float = 0.1, test: float = 0.1, seed: int = 0, *, plain: Dataset | None = None
) -> Splits:
    """Training, validation and test views of `dataset`; a fraction of 0 leaves that view out.

    `plain` is the same data without augmentation, for validation and test. The seed is of the split, not of
    the run: what is held out should stay held out when a run is repeated under another seed.
    """
    size = len(dataset)
    held = {name: held_out(size, fraction, name) for name, fraction in (("val", val), ("test", test))}
    rest = size - sum(held.values())
    if rest < 1:
        raise ValueError(
            f"val={val} and test={test} of {size} samples leave none for training: give smaller fractions"
        )
    permutation = Permutation(size, seed)
    plain = dataset if plain is None else plain
    return Splits(
        train=PermutedView(dataset, permutation, 0, rest),
        val=PermutedView(plain, permutation, rest, held["val"]) if held["val"] else None,
        test=PermutedView(plain, permutation, rest + held["val"], held["test"]) if held["test"] else None,
    )


def holdout(
    dataset: Dataset, fraction: float, seed: int = 0, *, plain: Dataset | None = None
) -> tuple[Dataset, Dataset | None]:
    """The rest of `dataset`, and the `fraction` of it that is held out."""
    splits = split(dataset, val=fraction, test=0.0, seed=seed, plain=plain)
    return splits.train, splits.val


def held_out(size: int, fraction: float, name: str) -> int:
    """How many of `size` samples the `fraction` called `name` is."""
    if not 0 <= fraction < 1:
        raise ValueError(f"{name}={fraction}: give the fraction of samples to hold out, from 0 to below 1")
    count = round(size * fraction)
    if fraction > 0 and count == 0:
        raise ValueError(
            f"{name}={fraction} of {size} samples is none: give a larger fraction, or 0 to go without"
        )
    return count
