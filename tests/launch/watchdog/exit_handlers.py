"""A recipe whose file registers an exit handler, as trackers and coverage do."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn, optim, randn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from launch.runtime import process_exit
from recipes.parts.data import Splits
from recipes.parts.regression import Regression


@dataclass(kw_only=True)
class Tracked(Regression):
    """Writes a file at exit, then hangs for as long as `exit_takes`, in seconds."""

    exit_takes: float = 0.0

    def build_data(self) -> Splits:
        return Splits(train=TensorDataset(randn(16, 4), randn(16, 1)))

    def build_model(self) -> nn.Module:
        atexit.register(self.at_exit)
        if self.exit_takes:
            process_exit.EXIT_TIMEOUT_S = 2.0
        return nn.Linear(4, 1)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return optim.SGD(model.parameters(), lr=0.01)

    def at_exit(self) -> None:
        """A tracker's."""
        Path(f"exited-{os.environ.get('RANK', '0')}").touch()
        time.sleep(self.exit_takes)
