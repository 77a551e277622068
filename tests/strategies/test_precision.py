"""bf16 and fp16 under every strategy; activation checkpointing and compilation, which must not show in the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import Tensor

from tests.ranks import World, run_ranks
from tests.strategies import models
from tests.strategies.training import Case, Outcome, assert_equal, each, raw, set_up, train, train_step

RANKS = {"single": 1, "fsdp-hybrid": 4}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", each())
def test_half_precision_stays_near_fp32(strategy: str, precision: str) -> None:
    case = Case(model="gpt", optimizer="sgd", micro_batches=4, options=(("precision", precision),))
    ours, full = run_ranks(RANKS.get(strategy, 2), train, strategy, case)[0], raw(Case(**{**vars(case), "options": ()}))
    torch.testing.assert_close(ours.losses, full.losses, rtol=2e-2, atol=0)
    torch.testing.assert_close(ours.norms, full.norms, rtol=2e-2, atol=0)
    assert ours.losses != full.losses


def overflowing(world: World, strategy: str) -> tuple[list[float], list[float], bool]:
    """Rank zero's gradient overflows in the second of four steps."""
    case = Case(model="mlp", micro_batches=world.world_size, options=(("precision", "fp16"),))
    made = set_up(world, strategy, case)
    scales, norms = [], []
    for step in range(4):
        before = made.state()["model/head.bias"].values.clone() if "model/head.bias" in made.state() else None
        if step == 1:
            with made.microbatch(last=True):
                loss = models.loss_sum(made.model, models.batch("mlp", step, world.rank))
                made.backward(loss * (1e30 if world.rank == 0 else 1.0))
            norms.append(made.step().item())
            after = made.state().get("model/head.bias")
            unchanged = before is None or torch.equal(before, after.values)
        else:
            norms.append(train_step(world, made, case, step)[1])
        scales.append(made.loss_scale.value)
    return scales, norms, unchanged


@pytest.mark.parametrize("strategy", each())
def test_an_overflow_is_skipped_on_all_ranks_alike(strategy: str) -> None:
    for scales, norms, unchanged in run_ranks(RANKS.get(strategy, 2), overflowing, strategy):
        assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
        assert [torch.tensor(norm).isfinite().item() for norm in norms] == [True, False, True, True]
        assert unchanged


def statistics(world: World, strategy: str, checkpointing: bool) -> dict[str, Tensor]:
    case = Case(model="cnn", micro_batches=world.world_size, options=(("activation_checkpointing", checkpointing),), steps=3)
    return {name: tensor for name, tensor in train(world, strategy, case).weights.items() if ".norm." in name}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_recomputation_leaves_running_statistics_alone(strategy: str) -> None:
    ranks = RANKS.get(strategy, 2)
    kept, recomputed = (run_ranks(ranks, statistics, strategy, flag)[0] for flag in (False, True))
    assert kept["blocks.0.norm.num_batches_tracked"] == 3
    for name, tensor in kept.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-6, atol=1e-7)


def compiled(world: World, strategy: str, case: Case) -> tuple[Outcome, dict[str, int]]:
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    return train(world, strategy, case), {**counters["frames"], "breaks": sum(counters["graph_break"].values())}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "fsdp-grad"])
def test_compiled_blocks_train_alike(strategy: str, checkpointing: bool) -> None:
    options = (("compile", True), ("activation_checkpointing", checkpointing))
    for model in ("mlp", "batchnorm"):
        case = Case(model=model, optimizer="sgd", micro_batches=4, steps=4)
        ours, frames = run_ranks(RANKS.get(strategy, 2), compiled, strategy, replace(case, options=options))[0]
        assert_equal(ours, raw(case))
        assert frames["ok"] >= 1, frames
        assert not frames["breaks"], frames
