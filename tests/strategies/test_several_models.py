"""Several models, trained in turns: each is called while it is frozen, and must be right in its own turn."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim import AdamW

from launch.equivalence.whole_model import whole_model
from strategies import strategy_class
from strategies.base import Strategy
from strategies.options import Options
from tests.ranks import CpuWorld, run_ranks
from tests.strategies.models import MLP, as_tensor, blocks
from tests.strategies.training import STRATEGIES, each

STEPS = 6
Models = dict[str, Any]


class Generator(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(13, 6)


def build(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return Generator() if name == "generator" else MLP()


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.01)


def noise(step: int, index: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 * step + index)
    return torch.randn(4, 6), torch.randn(4, 6)


def discriminate(models: Models, step: int, index: int) -> Tensor:
    """The generator and the teacher are frozen, and no gradient reaches them."""
    z, real = noise(step, index)
    fake = models["generator"](z)
    wanted = models["teacher"](real).softmax(-1)
    loss = functional.cross_entropy(models["critic"](real), wanted)
    return loss + as_tensor(models["critic"](fake)).square().mean()


def generate(models: Models, step: int, index: int) -> Tensor:
    """The critic is frozen; gradients flow through it."""
    z, _ = noise(step, index)
    return (as_tensor(models["critic"](models["generator"](z))) - 1).square().mean()


LOSSES = {"critic": discriminate, "generator": generate}


@cache
def reference(micro_batches: int) -> tuple[list[float], dict[str, list[Tensor]]]:
    models = {name: build(name) for name in ("critic", "generator", "teacher")}
    optimizers = {name: AdamW(models[name].parameters(), lr=0.01) for name in LOSSES}
    losses = []
    for step in range(STEPS):
        for name, loss in LOSSES.items():
            for index in range(micro_batches):
                value = loss(models, step, index) / micro_batches
                torch.autograd.backward(value)
                losses.append(value.item())
            optimizers[name].step()
            for model in models.values():
                model.zero_grad()
    return losses, {name: [p.detach() for p in model.parameters()] for name, model in models.items()}


def in_turns(world: CpuWorld, name: str, micro_batches: int) -> tuple[list[float], dict[str, list[Tensor]]]:
    options = Options(**STRATEGIES[name])
    strategies: dict[str, Strategy] = {}
    for model in ("critic", "generator", "teacher"):
        strategies[model] = strategy_class(options.strategy)(world, options)
        strategies[model].setup(partial(build, model), None if model == "teacher" else adamw, blocks)
    models = {model: strategy.model for model, strategy in strategies.items()}
    losses = []
    for step in range(STEPS):
        for turn, loss in LOSSES.items():
            frozen = [strategy for model, strategy in strategies.items() if model != turn]
            values = torch.zeros(micro_batches)
            local = range(world.rank, micro_batches, world.world_size)
            for index in local:
                last = index == local[-1]
                with frozen[0].frozen(), frozen[1].frozen(), strategies[turn].micro_batch(last=last):
                    value = loss(models, step, index) / micro_batches
                    strategies[turn].backward(value)
                values[index] = value.detach()
            strategies[turn].step()
            distributed.all_reduce(values)
            losses += values.tolist()
    # exporting gathers: all ranks, all models
    weights = {model: whole_model(strategy, world) for model, strategy in strategies.items()}
    return losses, {model: list(tensors.values()) for model, tensors in weights.items()}


@pytest.mark.parametrize("accumulation_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "strategy", each([name for name in STRATEGIES if name != "fsdp-hybrid"], ("single", "ddp", "fsdp"))
)
def test_a_gan_with_a_teacher_equals_raw_pytorch(strategy: str, accumulation_steps: int) -> None:
    ranks = 1 if strategy == "single" else 2
    losses, weights = run_ranks(ranks, in_turns, strategy, ranks * accumulation_steps)[0]
    expected_losses, expected = reference(ranks * accumulation_steps)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def interleaved(world: CpuWorld, name: str) -> tuple[list[float], dict[str, list[Tensor]]]:
    """Both models accumulate at the same time: micro-batch by micro-batch, one and the other."""
    options = Options(**STRATEGIES[name])
    strategies: dict[str, Strategy] = {}
    for model in ("critic", "generator", "teacher"):
        strategies[model] = strategy_class(options.strategy)(world, options)
        strategies[model].setup(partial(build, model), adamw, blocks)
    models = {model: strategy.model for model, strategy in strategies.items()}
    for step in range(STEPS):
        for index in (world.rank, world.rank + world.world_size):
            for turn, loss in LOSSES.items():
                frozen = [strategy for model, strategy in strategies.items() if model != turn]
                last = index >= world.world_size
                with frozen[0].frozen(), frozen[1].frozen(), strategies[turn].micro_batch(last=last):
                    strategies[turn].backward(loss(models, step, index) / 4)
        for turn in LOSSES:
            strategies[turn].step()
    return [], {model: list(whole_model(strategy, world).values()) for model, strategy in strategies.items()}


def interleaved_reference() -> dict[str, list[Tensor]]:
    models = {name: build(name) for name in ("critic", "generator", "teacher")}
    optimizers = {name: AdamW(models[name].parameters(), lr=0.01) for name in LOSSES}
    for step in range(STEPS):
        gradients: dict[str, list[Tensor]] = {}
        for name, loss in LOSSES.items():
            total = torch.stack([loss(models, step, index) / 4 for index in range(4)]).sum()
            gradients[name] = list(torch.autograd.grad(total, list(models[name].parameters())))
        for name, found in gradients.items():
            for parameter, gradient in zip(models[name].parameters(), found, strict=True):
                parameter.grad = gradient
            optimizers[name].step()
    return {name: [p.detach() for p in model.parameters()] for name, model in models.items()}


@pytest.mark.parametrize("strategy", each(["ddp", "fsdp", "fsdp-grad"]))
def test_turns_may_interleave_while_accumulating(strategy: str) -> None:
    _, weights = run_ranks(2, interleaved, strategy)[0]
    torch.testing.assert_close(weights, interleaved_reference(), rtol=1e-4, atol=1e-5)
