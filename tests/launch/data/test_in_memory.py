"""Data that lies in memory: the same samples as one by one, whoever loads them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from launch.data.batch_plan import BatchPlan
from launch.data.in_memory import IndexedView, as_in_memory
from launch.data.loader import InMemoryLoader, build_loader
from launch.data.sampler import TrainSampler
from launch.runtime.cpus import usable_cpus
from launch.runtime.world import World
from recipes.parts.augment import random_affine, random_crop_and_flip, uniform
from recipes.parts.data import InMemoryDataset
from recipes.parts.images import Images
from recipes.parts.permutation import GOLDEN, MASK, mix
from recipes.parts.split import split
from recipes.parts.text import Text
from tests.launch.tiny import Points

TENSORS = TensorDataset(torch.arange(40.0).view(20, 2), torch.arange(20))


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        Subset(TENSORS, [3, 1, 17]),
        split(TENSORS).train,
        Images(augment=False).build().train,
        Images(augment=False, image_size=6).build().val,
        Text(block=16).build().test,
    ],
    ids=["tensors", "subset", "split", "images", "smaller images", "text"],
)
def test_a_batch_holds_the_samples(dataset: Any) -> None:
    whole = as_in_memory(dataset)
    assert isinstance(whole, InMemoryDataset)
    assert len(whole) == len(dataset)
    indices = torch.tensor([2, 0, 1])
    found, expected = (
        whole.batch(indices, lambda: indices),
        default_collate([dataset[i] for i in indices.tolist()]),
    )
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert whole.nbytes > 0


def test_what_is_not_in_memory_is_read_one_by_one() -> None:
    assert as_in_memory(Points(10)) is None
    assert as_in_memory(split(Points(10)).train) is None
    assert as_in_memory(None) is None


def batches(micro: int, workers: int, start: int = 0) -> list[Tensor]:
    """The images of four steps of augmented training, one by one."""
    train = as_in_memory(Images().build().train)
    assert isinstance(train, IndexedView)
    batch_plan = BatchPlan(micro_batch_size=micro, accumulation_steps=8 // micro, rank=0, world_size=1)
    found = build_loader(
        train, TrainSampler(len(train), batch_plan, 7, start, 4), 7, "train", workers, World()
    )
    assert isinstance(found, InMemoryLoader) == (workers == 0)
    return [image for images, _ in islice(found, 4 * batch_plan.accumulation_steps) for image in images]


def test_augmentation_does_not_depend_on_who_loads() -> None:
    alone = batches(8, 0)
    assert len(alone) == 32
    for other in (batches(2, 0), batches(8, 1)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[16:], batches(8, 0, start=2), strict=True)), "resumed"


def test_uniform_draws_are_those_of_splitmix64() -> None:
    for seed in (0, 1, 2**62 + 5):
        expected = [(mix((seed + micro_step * GOLDEN) & MASK) >> 40) / 2**24 for micro_step in (1, 2, 3)]
        assert uniform(torch.tensor([seed]), 3)[0].tolist() == expected
    many = uniform(torch.arange(20_000), 2)
    assert many.min() >= 0
    assert many.max() < 1
    counts = torch.histc(many[:, 0], 10, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"
    assert torch.corrcoef(many.T)[0, 1].abs() < 0.03


def test_images_are_turned_and_moved_each_in_its_own_way() -> None:
    images = torch.zeros(50, 1, 21, 21)
    images[:, :, 10, 15] = 1.0  # five pixels to the right of the middle
    assert torch.allclose(random_affine(images, torch.arange(50), 0, 0), images, atol=1e-5)
    weight = random_affine(images, torch.arange(50), 90, 0).squeeze(1)
    rows, columns = (
        (weight * torch.arange(21.0)[:, None]).sum((1, 2)),
        (weight * torch.arange(21.0)).sum((1, 2)),
    )
    mass = weight.sum((1, 2))
    radius = torch.hypot(rows / mass - 10, columns / mass - 10)
    assert torch.allclose(radius, torch.full((50,), 5.0), atol=0.3), "turned about the middle"
    assert len(set((rows / mass).round(decimals=2).tolist())) > 30
    moved = random_affine(images, torch.arange(50), 0, 0.2).squeeze(1)
    place = (moved * torch.arange(21.0)).sum((1, 2)) / moved.sum((1, 2)) - 15
    assert place.abs().max() <= 0.2 * 21
    assert place.abs().max() > 3


def test_crops_are_windows_and_half_are_mirrored() -> None:
    images = (1 + torch.arange(64.0)).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    padded = torch.nn.functional.pad(images[0], [1] * 4)
    windows = {str(padded[:, top : top + 8, left : left + 8]) for top in range(3) for left in range(3)}
    mirrored = 0
    for image in random_crop_and_flip(images, torch.arange(200), 1):
        assert str(image) in windows or str(image.flip(2)) in windows
        mirrored += str(image) not in windows
    assert 70 < mirrored < 130


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("", 64), (None, 64)]
)
def test_a_container_that_may_use_two_cpus_has_two(
    text: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert usable_cpus(tmp_path) == cpus
