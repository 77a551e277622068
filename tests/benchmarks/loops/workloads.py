"""What the frameworks train, the same for all: data in memory, their order, model, optimizer, and a loss that
records when each step starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from launch.runtime.seeding import seed_device
from recipes.base import Recipe, local_num_items
from recipes.parts.data import Batch, Splits
from recipes.parts.permutation import Permutation
from recipes.parts.text import stdlib_source
from recipes.parts.transformer import Decoder
from strategies.deferred_init import initialize
from tests.benchmarks.loops import Setting

COMPARED_STEPS = 20
"""steps whose losses are kept"""


@dataclass(kw_only=True)
class Workload(Recipe):
    """A recipe that notes when each step starts, its first losses, and how its model is sharded.

    The data are repeated until no epoch ends within a run: what each framework does then is another
    question.
    """

    batch: int = 32
    samples: int = 10_000
    bare: bool = False

    def __post_init__(self) -> None:
        self.stamps: list[float] = []
        self.first_losses: list[Tensor] = []
        self.sharding = ""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, before they are repeated. The digits: [1797, 64] from 0 to 1, and their
        classes.
        """
        images, classes = load_digits(return_X_y=True)
        return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)

    def build_data(self) -> Splits:
        inputs, targets = self.rows()
        repeated = torch.arange(self.samples) % len(inputs)
        return Splits(train=TensorDataset(inputs[repeated], targets[repeated]))

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """As one writes it; if bare, with the fastest update for everybody: then only the loops differ."""
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True if self.bare else None)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.stamps.append(time.perf_counter())
        noted = len(self.first_losses) < COMPARED_STEPS
        if noted:
            self.sharding = sharding_of(model)
        inputs, targets = batch
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
        if noted:
            self.first_losses.append(loss.detach())
        return loss

    # for those that do not sum and do not cut batches by themselves -----------------------------------------

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What everybody else calls the loss."""
        return self.loss(model, batch) / local_num_items(self, batch)

    def initial_model(self) -> nn.Module:
        """The model with the weights that rankzero gives it under seed 0."""
        seed_device(0, "weights", "model")
        model = self.build_model()
        initialize(model, 0)
        return model

    def order(self, steps: int) -> Tensor:
        """Indices of the samples, [steps, batch], in the order of rankzero under seed 0."""
        positions = torch.arange(steps * self.batch)
        return torch.from_numpy(Permutation(self.samples, 0, 0)(positions.numpy())).view(steps, self.batch)

    def loader(self, steps: int, setting: Setting, batch_plan: bool = True) -> DataLoader[Batch]:
        """torch's own, of this rank's part of each batch; with `batch_plan=False` of all parts in turn."""
        parts = self.order(steps).view(steps, setting.ranks, -1)
        local = parts[:, setting.rank] if batch_plan else parts
        return DataLoader(
            self.build_data().train,  # type: ignore[arg-type]
            batch_size=self.batch // setting.ranks,
            sampler=local.flatten().tolist(),
        )


@dataclass(kw_only=True)
class MLP(Workload):
    """A step takes less than a millisecond."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@dataclass(kw_only=True)
class CNN(Workload):
    """Two convolutions."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
        )


@dataclass(kw_only=True)
class GPT(Workload):
    """Two blocks on the bytes of Python's standard library; a step takes 20 milliseconds."""

    batch: int = 16
    block: int = 64

    def rows(self) -> tuple[Tensor, Tensor]:
        tokens = torch.frombuffer(bytearray(stdlib_source(500_000)), dtype=torch.uint8).long()
        windows = tokens.unfold(0, self.block + 1, self.block)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def items_per_sample(self) -> int:
        return self.block

    def build_model(self) -> nn.Module:
        return Decoder(vocabulary=256, block=self.block, width=64, heads=4, layers=2, dropout=0.0)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        return model.get_submodule("blocks").children()


WORKLOADS: dict[str, type[Workload]] = {"mlp": MLP, "cnn": CNN, "gpt": GPT}


def sharding_of(model: nn.Module) -> str:
    """How the model is sharded, by its parameters, whatever was asked for; `whole`: each rank has it all."""
    parameters = list(model.parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "fsdp"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "zero3"
    return "zero2" if any(hasattr(parameter, "_hp_mapping") for parameter in parameters) else "whole"
