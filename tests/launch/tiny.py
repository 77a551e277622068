"""Recipes that train in milliseconds: imported by tests, and given to the real command as a file."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.parts.classification import Classification
from recipes.parts.data import Splits
from recipes.parts.regression import Regression
from recipes.resnet import ResNet

if TYPE_CHECKING:
    from torchmetrics import Metric

FEATURES, CLASSES = 5, 3


class Points:
    """`size` points and their targets; `noise` is an augmentation: drawn anew each time that a sample is
    read.
    """

    def __init__(self, size: int, classes: bool = False, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(size)
        self.inputs = torch.randn(size, FEATURES, generator=generator)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        if classes:
            self.targets = torch.randint(CLASSES, (size,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.inputs[index] + self.noise * torch.randn(FEATURES), self.targets[index]


def network(dropout: float, batchnorm: bool, outputs: int = 1) -> nn.Module:
    norm = nn.BatchNorm1d(8) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, outputs))


@dataclass(kw_only=True)
class Fit(Regression):
    """Regression with dropout, BatchNorm and augmentation, each as wanted."""

    size: int = 50
    """training samples"""
    held_out: int = 0
    """validation samples"""
    dropout: float = 0.2
    batchnorm: bool = False
    noise: float = 0.1
    lr: float = 1e-2
    optimizer: str = "adamw"
    """adamw, or sgd with two groups, the second at half the learning rate"""

    def build_data(self) -> Splits:
        return Splits(
            train=Points(self.size, noise=self.noise), val=Points(self.held_out) if self.held_out else None
        )

    def build_model(self) -> nn.Module:
        return network(self.dropout, self.batchnorm)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr)
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": self.lr / 2}]
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)

    def metrics(self) -> Mapping[str, Metric]:
        return super().metrics() if self.held_out > 1 else {}  # R2 of one sample is not defined


@dataclass(kw_only=True)
class Sort(Classification):
    """Classification of points."""

    size: int = 40
    held_out: int = 20

    def num_classes(self) -> int:
        return CLASSES

    def build_data(self) -> Splits:
        return Splits(train=Points(self.size, classes=True), val=Points(self.held_out, classes=True))

    def build_model(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


@dataclass(kw_only=True)
class Masked(Fit):
    """The loss counts the inputs above zero only: each micro-batch has another count."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        weights = (inputs > 0).sum(1, keepdim=True)
        loss: Tensor = ((model(inputs) - targets).square() * weights).sum()
        return loss

    def num_items(self, batch: Any) -> Tensor:
        count: Tensor = (batch[0] > 0).sum()
        return count


@dataclass(kw_only=True)
class Broken(Fit):
    """Goes wrong on one rank in one step, the way that `fail` says."""

    resume_may_change: ClassVar[tuple[str, ...]] = ("fail", "fail_rank", "pause")

    fail: str = "no"
    """raise, nan (loss), gradient (NaN, of a finite loss)"""
    fail_rank: int = 1
    fail_step: int = 3
    pause: float = 0.0
    """seconds that each step takes"""

    def __post_init__(self) -> None:
        self.step = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(self.pause)
        self.step += torch.is_grad_enabled()  # neither evaluation nor a second look at a failed step counts
        if os.environ.get("KILL_AT") == str(self.step):
            while not Path(os.environ["KILL_AFTER"]).exists():  # it is written behind the training
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        failing = self.step == self.fail_step and int(os.environ.get("RANK", "0")) == self.fail_rank
        if failing and self.fail == "raise":
            raise LookupError("the shelf is empty")
        for layer in model.modules():
            if isinstance(layer, Poisonable):
                layer.poisoned = failing and self.fail == "nan"
        inputs, targets = batch
        outputs = model(inputs)
        if failing and self.fail == "gradient":
            outputs.register_hook(lambda gradient: gradient * float("nan"))
        loss: Tensor = (outputs - targets).square().sum()
        return loss

    def build_model(self) -> nn.Module:
        return nn.Sequential(Poisonable(FEATURES, 8), nn.Dropout(self.dropout), nn.Linear(8, 1))

    def metrics(self) -> Mapping[str, Metric]:
        return {}


class Poisonable(nn.Linear):
    """Gives NaN while `poisoned`."""

    poisoned = False

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs * float("nan") if self.poisoned else outputs


@dataclass(kw_only=True)
class Forgiving(Broken):
    """Leaves steps with a NaN loss out."""

    skip_nonfinite: ClassVar[bool] = True


@dataclass(kw_only=True)
class Greedy(Fit):
    """Each sample takes as many gigabytes, and the process may have 5 more than it had when its model was
    built.
    """

    gigabytes: float = 1.0

    def build_model(self) -> nn.Module:
        resource.setrlimit(
            resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 5 * 2**30, resource.RLIM_INFINITY)
        )
        return super().build_model()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        torch.empty(len(batch[0]), int(self.gigabytes * 2**30), dtype=torch.uint8)
        return super().loss(model, batch)


@dataclass(kw_only=True)
class Unbuilt(Broken):
    """Has no model."""

    def build_model(self) -> nn.Module:
        raise RuntimeError("no such layer")


@dataclass(kw_only=True)
class Pair(Fit):
    """Two models: a student that is trained towards the targets, a judge that learns the student's error."""

    def models(self) -> Mapping[str, Any]:
        return {"student": self.build_model, "judge": lambda: nn.Linear(FEATURES, 1)}

    def optimizers(self) -> Mapping[str, Any]:
        return {
            name: lambda model: torch.optim.SGD(model.parameters(), lr=self.lr)
            for name in ("student", "judge")
        }

    def losses(self) -> Mapping[str, Any]:
        def student(models: dict[str, nn.Module], batch: Any) -> Tensor:
            inputs, targets = batch
            loss: Tensor = (models["student"](inputs) - targets).square().sum() + models["judge"](
                inputs
            ).square().sum()
            return loss

        def judge(models: dict[str, nn.Module], batch: Any) -> Tensor:
            inputs, targets = batch
            loss: Tensor = (
                (models["judge"](inputs) - (models["student"](inputs) - targets).abs()).square().sum()
            )
            return loss

        return {"judge": judge, "student": student}

    def metrics(self) -> Mapping[str, Metric]:
        return {}


@dataclass(kw_only=True)
class Shallow(ResNet):
    """A ResNet of half the depth."""

    def build_model(self) -> nn.Module:
        from torchvision.models.resnet import BasicBlock
        from torchvision.models.resnet import ResNet as Network

        model: nn.Module = Network(
            BasicBlock, [1, 1, 1, 1], num_classes=self.num_classes(), zero_init_residual=True
        )
        model.conv1 = nn.Conv2d(self.data.channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model
