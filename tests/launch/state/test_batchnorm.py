"""Running statistics do not depend on how a global batch is spread over ranks and accumulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from launch.runtime.world import World
from launch.state.batchnorm import RunningStatistics
from tests import ranks
from tests.ranks import run_ranks

STEPS, MICRO_BATCHES, MOMENTUM = 3, 4, 0.3


def batches() -> Tensor:
    """[step, micro-batch, sample, feature], each micro-batch with a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(STEPS, MICRO_BATCHES, 8, 5, generator=generator, dtype=torch.float64)
    shift = torch.randn(STEPS, MICRO_BATCHES, 1, 5, generator=generator, dtype=torch.float64)
    return noise * (1 + shift.abs()) + 3 * shift


def running(place: ranks.CpuWorld) -> tuple[Tensor, Tensor, float | None]:
    """Mean and variance after all steps, and the momentum of a layer that averages cumulatively."""
    layer, cumulative = (
        nn.BatchNorm1d(5, momentum=MOMENTUM).double(),
        nn.BatchNorm1d(5, momentum=None).double(),
    )
    statistics = RunningStatistics([nn.Sequential(layer, cumulative)])
    accumulation_steps = MICRO_BATCHES // place.world_size
    for step in batches():
        for micro_step in range(accumulation_steps):
            statistics.set_momentum(micro_step, accumulation_steps)
            cumulative(layer(step[micro_step * place.world_size + place.rank]))
    statistics.synchronize(World(rank=place.rank, world_size=place.world_size))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var, cumulative.momentum


def test_one_step_moves_them_once_by_the_mean_of_its_batch_statistics() -> None:
    mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for step in batches():
        mean = (1 - MOMENTUM) * mean + MOMENTUM * step.mean(1).mean(0)
        variance = (1 - MOMENTUM) * variance + MOMENTUM * step.var(1).mean(0)
    for world_size in (1, 2, 4):
        for found_mean, found_variance, momentum in run_ranks(world_size, running):
            torch.testing.assert_close(found_mean, mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found_variance, variance, rtol=1e-12, atol=1e-12)
            assert momentum is None, "a layer that averages cumulatively is left alone"


def test_without_accumulation_nothing_is_touched() -> None:
    layer = nn.BatchNorm1d(5, momentum=MOMENTUM)
    RunningStatistics([layer]).set_momentum(0, 1)
    assert layer.momentum == pytest.approx(MOMENTUM)
