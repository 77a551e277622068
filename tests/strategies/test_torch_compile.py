"""torch.compile: what is compiled, how often, and that it does not show in the numbers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.optim import SGD

from launch.equivalence.whole_model import whole_model
from strategies.base import Strategy
from strategies.options import Options
from strategies.zero import Zero
from tests.ranks import CpuWorld, run_ranks
from tests.strategies import models
from tests.strategies.training import Case, Outcome, assert_equal, raw_pytorch, train

RANKS = {"single": 1, "fsdp-hybrid": 4}


class Deep(nn.Module):
    """More blocks than torch compiles variants of one `forward`: all alike, or each of its own width."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.widths = [4 if alike else 3 + i for i in range(10)]
        self.blocks = nn.ModuleList(models.Residual(width) for width in self.widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(
            [block(x[:, :width]).sum() for block, width in zip(self.blocks, self.widths, strict=True)]
        ).sum()


def graphs(world: CpuWorld, alike: bool, checkpointing: str) -> tuple[list[int], bool]:
    """Graphs compiled after training, after evaluation, and after an evaluation of another batch size; right
    numbers?

    Compiled for real but for its last stage, the generation of code, which is slow and of no interest here.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile, torch.compile = torch.compile, partial(torch.compile, backend="aot_eager")
    try:
        strategy = Strategy(world, Options(compile=True, activation_checkpointing=checkpointing))
        strategy.setup(lambda: Deep(alike), lambda m: SGD(m.parameters(), lr=0.1), models.blocks)
    finally:
        torch.compile = compile
    plain = Deep(alike)
    plain.load_state_dict(whole_model(strategy, world))
    counts, right = [], True
    for training, rows in ((True, 4), (True, 4), (False, 4), (False, 3), (True, 4)):
        x = torch.randn(rows, 12)
        strategy.module.train(training)
        with nullcontext() if training else torch.no_grad(), strategy.micro_batch(last=True):
            loss = strategy.model(x)
        right &= torch.allclose(loss, plain(x), rtol=1e-5)
        if training:
            strategy.backward(loss)
            plain.zero_grad()
            plain(x).backward()
            right &= all(
                p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad)
                for p, q in zip(strategy._trainable, plain.parameters(), strict=True)
            )
            strategy.step(apply=False)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts, right


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_blocks_of_a_kind_are_compiled_once(checkpointing: str) -> None:
    assert run_ranks(1, graphs, True, checkpointing) == [([1, 1, 2, 3, 3], True)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_blocks_of_many_kinds_are_all_compiled(checkpointing: str) -> None:
    """torch gives up after 8 variants of one `forward`, and then runs it uncompiled."""
    assert run_ranks(1, graphs, False, checkpointing) == [([10, 10, 20, 30, 30], True)]


def compiled(world: CpuWorld, strategy: str, case: Case) -> tuple[Outcome, int, int]:
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    return (
        train(world, strategy, case),
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "checkpointing"),
    [
        *(("single", mode) for mode in ("none", "full", "every:2", "selective")),
        # what is compiled is a rank's own, and these find it compiled: each of them, and each mode once more
        *(("ddp", "full"), ("fsdp", "none"), ("fsdp", "selective"), ("fsdp-grad", "every:2")),
    ],
)
def test_compiled_blocks_train_alike(strategy: str, checkpointing: str) -> None:
    options = (("compile", True), ("activation_checkpointing", checkpointing))
    for model in ("mlp", "batchnorm"):
        case = Case(model=model, optimizer="sgd", micro_batches=4, steps=4)
        ours, graphs, breaks = run_ranks(
            RANKS.get(strategy, 2), compiled, strategy, replace(case, options=options)
        )[0]
        assert_equal(ours, raw_pytorch(case))
        assert (graphs, breaks) == (1, 0)
        if strategy == "single" and model == "batchnorm":
            for name, tensor in raw_pytorch(case).weights.items():  # running statistics among them
                torch.testing.assert_close(ours.weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "checkpointing"), [("zero1", "selective"), ("zero3", "full"), ("zero3", "selective")]
)
def test_compiled_blocks_train_alike_under_zero(strategy: str, checkpointing: str) -> None:
    """DeepSpeed's hooks cut the blocks of ZeRO-3 into pieces: slower, but as right."""
    options = (("compile", True), ("activation_checkpointing", checkpointing))
    case = Case(model="mlp", optimizer="sgd", micro_batches=4, steps=4)
    if strategy == "zero3" and checkpointing == "selective":
        refused = Options(compile=True, activation_checkpointing=checkpointing, strategy="zero3")
        with pytest.raises(ValueError, match="use activation_checkpointing=full, or strategy=fsdp"):
            Zero(CpuWorld(0, 0, 2, 2), refused)
        return
    ours, graphs, breaks = run_ranks(2, compiled, strategy, replace(case, options=options))[0]
    assert_equal(ours, raw_pytorch(case))
    assert graphs >= 1
    assert strategy == "zero3" or (graphs, breaks) == (1, 0)


def compile_calls(world: CpuWorld, mode: Any) -> list[dict[str, Any]]:
    """What torch.compile is compile_calls for."""
    calls: list[dict[str, Any]] = []

    def record(forward: Any, **settings: Any) -> Any:
        calls.append(settings)
        return forward

    compile = torch.compile
    torch.compile = record  # type: ignore[assignment]
    try:
        strategy = Strategy(world, Options(compile=mode))
        strategy.setup(partial(models.build, "mlp"), None, models.blocks)
        strategy.setup(partial(models.build, "mlp"), None, lambda _: ())
    finally:
        torch.compile = compile
    return calls


@pytest.mark.parametrize(
    ("mode", "torch_mode"), [(True, None), ("default", "default"), ("max-autotune", "max-autotune")]
)
def test_the_mode_is_torchs_own(mode: Any, torch_mode: str | None) -> None:
    settings = {"mode": torch_mode, "dynamic": None}
    assert run_ranks(1, compile_calls, mode)[0] == [settings] * 3  # two blocks, then a whole model
    assert run_ranks(1, compile_calls, False)[0] == []


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_refuse_to_accumulate(mode: Any) -> None:
    strategy = Strategy(CpuWorld(0, 0, 1, 1, device="cuda:0"), Options(compile=mode))
    with (
        pytest.raises(ValueError, match="does not go with gradient accumulation"),
        strategy.micro_batch(last=False),
    ):
        pass
    with strategy.micro_batch(last=True):
        pass
    with Strategy(CpuWorld(0, 0, 1, 1), Options(compile=mode)).micro_batch(last=False):  # no graphs on a CPU
        pass
