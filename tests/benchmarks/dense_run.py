"""A run of a multilayer perceptron on random numbers, as large as a benchmark wants it, without the command
around it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from launch.cli.config import CheckpointOptions, Config
from launch.cli.resolve import Settings
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import finish
from recipes.base import Recipe
from recipes.parts.data import Batch, Splits
from tests.launch.runs import LoopParts, loop_parts


@dataclass(kw_only=True)
class Dense(Recipe):
    """A multilayer perceptron on random numbers."""

    width: int = 8
    layers: int = 1
    samples: int = 16
    adam: bool = False

    def build_data(self) -> Splits:
        """One batch, in memory; a benchmark may make its own."""
        return Splits(train=TensorDataset(*torch.randn(2, self.samples, self.width)))

    def build_model(self) -> nn.Module:
        """Linear layers and ReLU."""
        return nn.Sequential(
            *[m for _ in range(self.layers) for m in (nn.Linear(self.width, self.width), nn.ReLU())]
        )

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Plain SGD, or Adam with two more tensors a parameter."""
        if self.adam:
            return torch.optim.Adam(model.parameters(), lr=1e-3)
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The linear layers."""
        return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error, summed."""
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


@contextmanager
def prepared(recipe: Dense, **checkpoint: Any) -> Iterator[tuple[Run, LoopParts]]:
    """A run of `recipe` that never ends by itself."""
    config = Config(
        recipe="dense",
        strategy="single",
        batch_size=recipe.samples,
        steps=10**9,
        checkpoint=CheckpointOptions(**checkpoint),
    )
    run = prepare(Settings(config, recipe), World())
    with tempfile.TemporaryDirectory() as folder:
        parts = loop_parts(run, Path(folder))
        yield run, parts
        finish(run, *parts)
