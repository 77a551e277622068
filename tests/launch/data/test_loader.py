"""The order of the samples: the same on any number of ranks, found at any step, at no cost."""

from __future__ import annotations

import random
import tracemalloc
from itertools import islice
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from launch.data.batch import to_device
from launch.data.batch_plan import BatchPlan
from launch.data.loader import build_loader, default_workers
from launch.data.prefetch import group_micro_batches
from launch.data.sampler import EvalSampler, TrainSampler
from launch.runtime.world import World
from tests.launch.runs import StreamSample, as_samples, stream_samples

RANKS_AND_ACCUMULATION = [(1, 4), (2, 2), (4, 1)]
BATCH, MICRO = 12, 3


def global_batches(
    size: int, ranks: int, start: int, stop: int, seed: int = 0
) -> list[list[list[StreamSample]]]:
    """The micro-batches of each global batch by position, collected from the samplers of all ranks."""
    cuts = [
        BatchPlan(
            micro_batch_size=MICRO, accumulation_steps=BATCH // MICRO // ranks, rank=r, world_size=ranks
        )
        for r in range(ranks)
    ]
    dealt = [
        [as_samples(draws) for draws in TrainSampler(size, batch_plan, seed, start, stop)]
        for batch_plan in cuts
    ]
    batches = []
    for step in range(stop - start):
        found = {
            batch_plan.micro_batch_index(micro_step): dealt[batch_plan.rank][
                step * batch_plan.accumulation_steps + micro_step
            ]
            for batch_plan in cuts
            for micro_step in range(batch_plan.accumulation_steps)
        }
        batches.append([found[micro_batch_index] for micro_batch_index in sorted(found)])
    return batches


@pytest.mark.parametrize("size", [31, 36, 50, 5, 1])
def test_the_order_does_not_depend_on_the_ranks_and_each_epoch_is_a_permutation(size: int) -> None:
    steps = -(-2 * size // BATCH) + 1
    expected = stream_samples(size, 0, 0, steps * BATCH)
    for ranks, _ in RANKS_AND_ACCUMULATION:
        batches = global_batches(size, ranks, 0, steps)
        assert all([len(micro) for micro in batch] == [MICRO] * (BATCH // MICRO) for batch in batches)
        assert [draw for batch in batches for micro in batch for draw in micro] == expected
    epochs = [[index for epoch, index in expected if epoch == number] for number in (0, 1)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(size))
        assert expected[number * size : (number + 1) * size] == [(number, index) for index in epoch], (
            "epochs follow each other"
        )
    if size > 30:
        assert epochs[0] != epochs[1]
        assert epochs[0] != list(range(size))
        assert epochs[0] != [index for _, index in stream_samples(size, 1, 0, size)], (
            "another seed, another order"
        )


@pytest.mark.parametrize("start", range(1, 9))
def test_any_step_is_where_the_stream_would_be(start: int) -> None:
    whole = global_batches(31, 1, 0, 9)
    for ranks, _ in RANKS_AND_ACCUMULATION:
        assert global_batches(31, ranks, start, 9) == whole[start:]


def test_a_huge_data_set_costs_nothing() -> None:
    batch_plan = BatchPlan(micro_batch_size=16, accumulation_steps=2, rank=3, world_size=64)
    sampler = TrainSampler(10**12, batch_plan, 0, 4 * 10**8, 5 * 10**8)  # in its first epoch, and far into it
    stream_samples(1000, 0, 0, 10)  # numpy is imported before we measure
    tracemalloc.start()
    found = [index for draws in islice(sampler, 200) for index in draws[1].tolist()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert len(set(found)) == len(found) == 200 * 16
    assert max(found) > 5 * 10**11 > min(found), "from all over the data"


class Augmented:
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, Tensor, float, float]:
        return index, torch.rand(2), float(numpy.random.rand()), random.random()


def drawn(ranks: int, workers: int, start: int = 0) -> dict[Any, Any]:
    """What each (position in the stream) drew."""
    found: dict[Any, Any] = {}
    for rank in range(ranks):
        batch_plan = BatchPlan(micro_batch_size=2, accumulation_steps=4 // ranks, rank=rank, world_size=ranks)
        batches = build_loader(
            Augmented(), TrainSampler(10, batch_plan, 7, start, 3), 7, "train", workers, World()
        )
        for step, turns in enumerate(group_micro_batches(batches, batch_plan.accumulation_steps), start):
            for micro_step, (indices, *values) in enumerate(turns):
                for i, index in enumerate(indices.tolist()):
                    found[step, batch_plan.micro_batch_index(micro_step), i] = (
                        index,
                        *(value[i].tolist() for value in values),
                    )
    return found


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    alone = drawn(1, 0)
    assert len(alone) == 3 * 8
    assert drawn(1, 2) == alone, "workers"
    assert drawn(2, 0) == drawn(4, 0) == alone, "ranks"
    assert drawn(1, 0, start=2) == {key: value for key, value in alone.items() if key[0] == 2}, "resumed"
    for column in range(1, 4):
        assert len({str(value[column]) for value in alone.values()}) == len(alone), (
            "no two draws are alike, in any generator"
        )


def test_augmentation_leaves_no_trace_of_the_run_before() -> None:
    before = drawn(1, 0)
    torch.manual_seed(99)
    numpy.random.seed(99)
    random.seed(99)
    assert drawn(1, 0) == before


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3, 8, 50])
def test_evaluation_counts_each_sample_once(ranks: int, micro: int) -> None:
    for size in range(1, 41):
        samplers = [EvalSampler(size, micro, rank, ranks) for rank in range(ranks)]
        assert len({len(sampler) for sampler in samplers}) == 1, "ranks in step"
        counted = []
        for sampler in samplers:
            batches = [as_samples(draws) for draws in sampler]
            assert len(batches) == len(sampler)
            assert all(0 < len(batch) <= micro for batch in batches), (
                "none is empty: a forward pass is a collective"
            )
            counted += [
                index
                for micro_step, batch in enumerate(batches)
                if sampler.counts(micro_step)
                for _, index in batch
            ]
        assert sorted(counted) == list(range(size))


def test_to_device_keeps_the_form_of_a_batch() -> None:
    batch = {"x": torch.ones(2), "more": [torch.zeros(1), ("name", 3)]}
    moved = to_device(batch, "meta")
    assert moved["x"].device.type == moved["more"][0].device.type == "meta"
    assert list(moved["more"][1]) == ["name", 3]


def test_the_workers_of_a_node_share_its_cpus() -> None:
    for local in (1, 2, 64):
        assert 0 <= default_workers(World(local_world_size=local, world_size=64)) <= 8
    assert default_workers(World(local_world_size=1024, world_size=1024)) == 0
