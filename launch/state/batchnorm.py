"""BatchNorm's running statistics, made independent of how the global batch is spread over ranks and
accumulation.

A step over A micro-batches should move the running statistics once, by the mean of the A batch statistics.
PyTorch moves them once per forward, so ranks and gradient accumulation would count differently. Two facts
help.
Momentum m / (A - (A-1-i) m) for micro-batch i of A gives each the same weight and the old value 1-m in all.
And since the update is linear, ranks may drift apart and be averaged later: the average of the drifted is the
drift of the average.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from launch.runtime.collectives import all_reduce_sum
from launch.runtime.world import World
from strategies.activation_checkpointing import BATCH_NORMS


class RunningStatistics:
    """The BatchNorm layers of a run's models. Layers that average cumulatively (momentum=None) are left
    alone.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        layers = [
            m
            for model in models
            for m in model.modules()
            if isinstance(m, BATCH_NORMS) and m.track_running_stats
        ]
        self.layers = [(layer, layer.momentum) for layer in layers if layer.momentum is not None]

    def set_momentum(self, micro_step: int, accumulation_steps: int) -> None:
        """Weigh the micro-batches of a step alike; to be called before each forward."""
        if accumulation_steps > 1:
            for layer, momentum in self.layers:
                layer.momentum = momentum / (
                    accumulation_steps - (accumulation_steps - 1 - micro_step) * momentum
                )

    def synchronize(self, world: World) -> None:
        """Average over ranks, before evaluation and saving. Collective: one all-reduce."""
        if world.world_size == 1 or not self.layers:
            return
        buffers = [
            b for layer, _ in self.layers for b in (layer.running_mean, layer.running_var) if b is not None
        ]
        flat = all_reduce_sum(torch.cat([buffer.flatten() for buffer in buffers])) / world.world_size
        for buffer, mean in zip(
            buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True
        ):
            buffer.copy_(mean.view_as(buffer))
