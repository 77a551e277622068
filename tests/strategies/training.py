"""The same training twice: by hand in raw PyTorch on one process, and by a strategy on N ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, distributed, nn

from launch.equivalence.whole_model import whole_model
from strategies import strategy_class
from strategies.base import Strategy
from strategies.options import DDPOptions, FSDPOptions, Options
from strategies.sharded_state import TensorSlice
from tests.ranks import CpuWorld
from tests.strategies import models

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "ddp-unused": {"strategy": "ddp", "ddp": DDPOptions(find_unused_parameters=True)},
    "fsdp": {"strategy": "fsdp"},
    "fsdp-grad": {"strategy": "fsdp", "fsdp": FSDPOptions(shard="grad")},
    "fsdp-sync": {"strategy": "fsdp", "fsdp": FSDPOptions(sync_every_micro_batch=True)},
    "fsdp-hybrid": {"strategy": "fsdp", "fsdp": FSDPOptions(shard="hybrid", shard_size=2)},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
}

QUICK = ("single", "ddp", "fsdp", "zero3")
"""what stands for all where a test is not about a variant; the others are marked slow"""


def each(names: Iterable[str] = STRATEGIES, quick: Collection[str] = QUICK) -> list[ParameterSet]:
    """Strategies to parametrize a test with."""
    return [pytest.param(name, id=name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, on `micro_batches` a step, however many ranks share them."""

    model: str = "mlp"
    optimizer: str = "adamw"
    micro_batches: int = 2
    steps: int = 5
    first_step: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    """fields of Options that differ from the default, as items"""

    def option(self, name: str) -> Any:
        return dict(self.options).get(name)


@dataclass
class Outcome:
    """Global losses and gradient norms by step, and what the training ended with."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, TensorSlice] = field(default_factory=dict)


class InMemoryCheckpoint:
    """A checkpoint in memory, put together from the ranges of all ranks. Fails if they leave a gap or
    overlap.
    """

    def __init__(self, ranks: list[dict[str, TensorSlice]]) -> None:
        pieces: dict[str, list[TensorSlice]] = {}
        for rank in ranks:
            for name, piece in rank.items():
                pieces.setdefault(name, []).append(piece)
        self.shapes = {name: found[0].shape for name, found in pieces.items()}
        self.tensors: dict[str, Tensor] = {}
        for name, found in pieces.items():
            position = 0
            for piece in sorted(found, key=lambda piece: piece.start):
                assert piece.start == position, f"{name}: {piece.start} after {position}"
                assert piece.shape == self.shapes[name]
                position += piece.values.numel()
            assert position == torch.Size(self.shapes[name]).numel(), f"{name} ends at {position}"
            self.tensors[name] = torch.cat([p.values for p in sorted(found, key=lambda piece: piece.start)])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@cache
def raw_pytorch(case: Case) -> Outcome:
    """The textbook, with nothing of ours."""
    model = models.build(case.model)
    optimizer = models.optimizer(case.optimizer, model)
    outcome = Outcome()
    for step in range(case.steps):
        batches = [models.batch(case.model, step, index) for index in range(case.micro_batches)]
        count = sum(targets.numel() for _, targets in batches)
        total = 0.0
        for index, batch in enumerate(batches):
            torch.manual_seed(7000 + 100 * step + index)
            loss = models.loss_sum(model, batch) / count
            torch.autograd.backward(loss)
            total += loss.item()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, case.option("clip_norm") or float("inf"))
        if case.option("clip_value"):
            nn.utils.clip_grad_value_(trained, case.option("clip_value"))
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(total)
        outcome.norms.append(norm.item())
    outcome.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return outcome


def set_up(world: CpuWorld, strategy: str, case: Case) -> Strategy:
    options = Options(**{**STRATEGIES[strategy], **dict(case.options)})
    made = strategy_class(options.strategy)(world, options)
    made.setup(partial(models.build, case.model), partial(models.optimizer, case.optimizer), models.blocks)
    return made


def train(world: CpuWorld, strategy: str, case: Case, saved: InMemoryCheckpoint | None = None) -> Outcome:
    """The same training under a strategy, from `saved` on."""
    made = set_up(world, strategy, case)
    if saved is not None:
        made.load_state(saved)
    outcome = Outcome()
    for step in range(case.first_step, case.first_step + case.steps):
        loss, norm = train_step(world, made, case, step)
        outcome.losses.append(loss)
        outcome.norms.append(norm)
    outcome.state = {
        name: TensorSlice(p.values.cpu().clone(), p.start, p.shape) for name, p in made.state().items()
    }
    outcome.weights = whole_model(made, world)
    return outcome


def train_step(world: CpuWorld, strategy: Strategy, case: Case, step: int) -> tuple[float, float]:
    """One optimizer step: this rank's share of its micro-batches."""
    count = sum(models.batch(case.model, step, index)[1].numel() for index in range(case.micro_batches))
    local = range(world.rank, case.micro_batches, world.world_size)
    total = torch.zeros((), dtype=torch.float64)
    for index in local:
        torch.manual_seed(7000 + 100 * step + index)
        with strategy.micro_batch(last=index == local[-1]):
            loss = models.loss_sum(strategy.model, models.batch(case.model, step, index)) / count
            strategy.backward(loss)
        total += loss.detach()
    norm = strategy.step()
    distributed.all_reduce(total)
    assert type(norm) is Tensor
    return total.item(), norm.item()


def assert_equal(ours: Outcome, other: Outcome, losses: float = 1e-5, weights: float = 1e-4) -> None:
    """Losses and norms within `losses`, relative; weights within `weights` of the largest of each tensor."""
    torch.testing.assert_close(ours.losses, other.losses, rtol=losses, atol=0.0)
    torch.testing.assert_close(ours.norms, other.norms, rtol=losses, atol=0.0)
    trained = {
        n for n in other.weights if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    assert trained <= other.weights.keys()
    for name in trained:
        if name in ours.weights:  # a tied tensor comes once
            scale = other.weights[name].abs().max().item()
            torch.testing.assert_close(
                ours.weights[name], other.weights[name], rtol=0.0, atol=weights * scale, msg=name
            )
