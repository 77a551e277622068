"""Whole models from the shards of all ranks, for comparisons only: no run ever gathers a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from launch.runtime.collectives import all_reduce_sum
from strategies.base import Strategy
from strategies.sharded_state import unique_state
from strategies.world_info import WorldInfo


def whole_model(strategy: Strategy, world: WorldInfo) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, whole, on the host of rank zero; elsewhere empty.
    Collective.

    Put together from `Strategy.state` of all ranks, one tensor at a time.
    """
    state = strategy.state()
    gathered: dict[str, Tensor] = {}
    for name, tensor in unique_state(strategy.module):
        shape = strategy.layout.shapes[f"model/{name}"]
        whole = torch.zeros(math.prod(shape), dtype=tensor.dtype, device=world.device)
        if (part := state.get(f"model/{name}")) is not None:
            whole[part.start : part.start + part.values.numel()] = part.values
        all_reduce_sum(whole.view(torch.uint8))  # each byte comes from one rank: exact, whatever the dtype
        if world.rank == 0:
            gathered[name] = whole.view(shape).cpu()
    return gathered


def fingerprints(strategy: Strategy, world: WorldInfo) -> dict[str, Tensor]:
    """One number (float64) for each floating-point tensor of a model, that moves when any element does.
    Collective.

    A weighted sum over all elements, summed over the slices that each rank holds: nothing is gathered.
    """
    state = strategy.state()
    names = [name for name, tensor in unique_state(strategy.module) if tensor.is_floating_point()]
    sums = torch.zeros(len(names), dtype=torch.float64)
    for index, name in enumerate(names):
        if (part := state.get(f"model/{name}")) is not None:
            positions = torch.arange(part.start + 1, part.start + part.values.numel() + 1)
            sums[index] = torch.dot(part.values.cpu().double(), positions.double().cos())
    return dict(zip(names, all_reduce_sum(sums.to(world.device)).cpu(), strict=True))
