"""What only DDP does: unused parameters, static graphs, refused options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from strategies.ddp import DDP
from strategies.options import DDPOptions, Options
from tests.ranks import CpuWorld, RanksFailed, run_ranks
from tests.strategies import models
from tests.strategies.training import Case, Outcome, raw_pytorch, set_up, train, train_step


class Branches(nn.Module):
    """Takes one of two ways, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, ways: str) -> Tensor:
        x = self.stem(x)
        return torch.stack([getattr(self, way)(x).sum() for way in ways.split("+")]).sum()


def build() -> Branches:
    torch.manual_seed(0)
    return Branches()


def two_steps(world: CpuWorld, ways: list[list[str]], options: DDPOptions) -> tuple[str, list[Tensor]]:
    """Two steps; `ways[rank]` is the way of each micro-batch. Returns the error, and the weights after it."""
    strategy = DDP(world, Options(strategy="ddp", ddp=options))
    strategy.setup(build, lambda model: SGD(model.parameters(), lr=0.1), lambda _: ())
    try:
        for step in range(2):
            local = ways[world.rank]
            for index, way in enumerate(local):
                with strategy.micro_batch(last=index == len(local) - 1):
                    strategy.backward(strategy.model(torch.full((1, 3), 1.0 + step), way))
            strategy.step()
    except RuntimeError as error:
        return str(error), [p.detach() for p in strategy.module.parameters()]
    return "", [p.detach() for p in strategy.module.parameters()]


def reference(ways: list[list[str]]) -> list[Tensor]:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(2):
        for way in [way for rank in ways for way in rank]:
            model(torch.full((1, 3), 1.0 + step), way).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("ways", [[["left"], ["left"]], [["left+right", "left"], ["left", "left+right"]]])
def test_unused_parameters_are_named(ways: list[list[str]]) -> None:
    answers = run_ranks(2, two_steps, ways, DDPOptions())
    if "right" in ways[0][0]:  # used by an earlier micro-batch: its gradient counts
        assert [error for error, _ in answers] == ["", ""]
        for _, weights in answers:
            torch.testing.assert_close(weights, reference(ways))
        return
    for error, weights in answers:
        assert "no gradient for right.weight, right.bias: not used" in error
        assert "ddp.find_unused_parameters=true" in error
        assert all(map(torch.equal, weights, build().parameters()))


def test_a_parameter_that_one_rank_misses_is_named_there_and_nobody_hangs() -> None:
    (fine, weights), (error, untouched) = run_ranks(2, one_step)
    assert "no gradient for right.weight, right.bias" in error
    assert fine == ""
    assert all(map(torch.equal, untouched, build().parameters()))
    # the other rank's step was right all the same: a gradient of zero is what this rank had to add
    model = build()
    for way in ("left+right", "left"):
        model(torch.ones(1, 3), way).backward()
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(weight, parameter - 0.1 * parameter.grad)


def after_dropped_gradients(world: CpuWorld) -> str:
    """A step without some gradient is dropped, the next one is whole."""
    strategy = DDP(world, Options(strategy="ddp"))
    strategy.setup(build, lambda model: SGD(model.parameters(), lr=0.1), lambda _: ())
    for ways in ("left", "left+right"):
        with strategy.micro_batch(last=True):
            strategy.backward(strategy.model(torch.ones(1, 3), ways))
        try:
            strategy.step(apply=ways != "left")
        except RuntimeError as error:
            return str(error)
    return ""


def test_dropped_gradients_are_not_complained_about_in_the_next_step() -> None:
    assert run_ranks(2, after_dropped_gradients, timeout=20) == ["", ""]


def one_step(world: CpuWorld) -> tuple[str, list[Tensor]]:
    strategy = DDP(world, Options(strategy="ddp"))
    strategy.setup(build, lambda model: SGD(model.parameters(), lr=0.1), lambda _: ())
    with strategy.micro_batch(last=True):
        strategy.backward(strategy.model(torch.ones(1, 3), "left" if world.rank else "left+right"))
    try:
        strategy.step()
    except RuntimeError as error:
        return str(error), [p.detach() for p in strategy.module.parameters()]
    return "", [p.detach() for p in strategy.module.parameters()]


@pytest.mark.parametrize(
    "ways", [[["left"], ["left"]], [["left"], ["right"]], [["left", "right"], ["left", "left"]]]
)
def test_find_unused_parameters_lets_them_go_without_gradient(ways: list[list[str]]) -> None:
    for error, weights in run_ranks(2, two_steps, ways, DDPOptions(find_unused_parameters=True)):
        assert error == ""
        torch.testing.assert_close(weights, reference(ways))


def static(world: CpuWorld, case: Case) -> list[float]:
    strategy = set_up(world, "ddp", case)
    return [train_step(world, strategy, case, step)[0] for step in range(case.steps)]


def test_a_static_graph_trains_alike_but_refuses_to_accumulate() -> None:
    case = Case(model="gpt", options=(("ddp", DDPOptions(static_graph=True)),))
    outcome = raw_pytorch(Case(model="gpt"))
    torch.testing.assert_close(run_ranks(2, static, case)[0], outcome.losses, rtol=1e-5, atol=0)
    many = Case(model="gpt", micro_batches=4, options=(("ddp", DDPOptions(static_graph=True)),))
    with pytest.raises(RanksFailed, match="does not go with gradient accumulation"):
        run_ranks(2, static, many)


def compressed(world: CpuWorld, case: Case) -> Outcome:
    return train(world, "ddp", case)


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [
        (4, {}),
        (2, {"static_graph": True}),
        pytest.param(4, {"find_unused_parameters": True}, marks=pytest.mark.slow),
    ],
)
def test_compressed_gradients_are_rounded_and_alike_on_all_ranks(
    micro_batches: int, options: dict[str, bool]
) -> None:
    # a clip norm that never clips: what is multiplied in place are views of the buckets
    case = Case(model="gpt", optimizer="sgd", micro_batches=micro_batches, options=(("clip_norm", 1e4),))
    ranks = run_ranks(
        2, compressed, replace(case, options=(("ddp", DDPOptions(compress="bf16", **options)), *case.options))
    )
    assert ranks[0].losses == ranks[1].losses
    assert ranks[0].norms == ranks[1].norms
    expected = raw_pytorch(case)
    assert ranks[0].losses[0] == pytest.approx(expected.losses[0], rel=1e-6)  # what is computed is fp32
    torch.testing.assert_close(ranks[0].losses, expected.losses, rtol=2e-3, atol=0)
    torch.testing.assert_close(ranks[0].norms, expected.norms, rtol=1e-2, atol=0)
    # bf16 keeps 8 bits: of nearly each gradient some are lost
    assert abs(ranks[0].norms[0] / expected.norms[0] - 1) > 1e-6


def test_gradients_are_views_of_the_buckets() -> None:
    assert run_ranks(2, bucketed) == [(1, True)] * 2


def bucketed(world: CpuWorld) -> tuple[int, bool]:
    """Storages that hold the gradients of a step, and whether the next step finds none of them."""
    strategy = set_up(world, "ddp", Case())
    for step in range(2):  # buckets are built again after the first
        assert not strategy._gradients()
        with strategy.micro_batch(last=True):
            strategy.backward(models.loss_sum(strategy.model, models.batch("mlp", step, world.rank)))
        storages = {gradient.untyped_storage().data_ptr() for gradient in strategy._gradients()}
        strategy.step(apply=False)
    return len(storages), not strategy._gradients()


def test_options_that_contradict_are_refused() -> None:
    world = CpuWorld(0, 0, 2, 2)
    with pytest.raises(ValueError, match="drop one of the two keys"):
        DDP(world, Options(ddp=DDPOptions(static_graph=True, find_unused_parameters=True)))
    with pytest.raises(ValueError, match="at least 1 MB"):
        DDP(world, Options(ddp=DDPOptions(bucket_mb=0)))


def fixed(world: CpuWorld) -> tuple[bool, bool, int]:
    strategy = DDP(world, Options(strategy="ddp"))
    strategy.setup(build, None, lambda _: ())
    with strategy.frozen():
        needs = strategy.model(torch.ones(1, 3), "left").requires_grad
    return strategy.model is strategy.module, needs, len(strategy.state())


def test_a_fixed_model_is_not_wrapped() -> None:
    assert run_ranks(2, fixed) == [(True, False, 7)] * 2
