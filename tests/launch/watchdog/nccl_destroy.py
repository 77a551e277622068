"""A recipe that raises on one rank, where leaving the process group waits for all ranks, as NCCL does: on a
CPU.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from recipes.parts.data import Splits
from recipes.parts.regression import Regression

destroy = dist.destroy_process_group
MET = Path("left-the-group")


def destroy_as_nccl_does(group: Any = None) -> None:
    """Wait for all ranks (https://github.com/pytorch/pytorch/pull/141510), then leave the group."""
    MET.mkdir(exist_ok=True)
    (MET / os.environ["RANK"]).touch()
    while len(list(MET.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    destroy(group)


dist.destroy_process_group = destroy_as_nccl_does


@dataclass(kw_only=True)
class Raising(Regression):
    """Raises on `fail_rank` in its fourth step, or in the evaluation after it."""

    skip_nonfinite: ClassVar[bool] = True  # each loss is read before its step, so numbers are pending

    fail: str = "forward"
    """forward, evaluate, interrupt (Ctrl-C before training), memory, export (on rank zero), no"""
    fail_rank: int = 1

    def __post_init__(self) -> None:
        self.calls = 0

    def build_data(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        tensors = torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator)
        return Splits(train=TensorDataset(*tensors), val=TensorDataset(*(part[:16] for part in tensors)))

    def build_model(self) -> nn.Module:
        if self.fail == "interrupt" and os.environ["RANK"] == "1":
            raise KeyboardInterrupt
        return nn.Linear(4, 1)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        if self.fail == "export":
            self.break_export()
        return torch.optim.SGD(model.parameters(), lr=0.01)

    def break_export(self) -> None:
        """The file of the weights is a folder that is in the way."""
        Path("run/model.safetensors/in the way").mkdir(parents=True, exist_ok=True)

    def eval_step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += torch.is_grad_enabled()
        now = "forward" if torch.is_grad_enabled() else "evaluate"
        if self.calls == 4 and int(os.environ["RANK"]) == self.fail_rank and self.fail in (now, "memory"):
            raise MemoryError("out of memory") if self.fail == "memory" else LookupError("the shelf is empty")
        return super().eval_step(model, batch)
