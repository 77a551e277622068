"""bf16 and fp16 under every strategy."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import CpuWorld, run_ranks
from tests.strategies import models
from tests.strategies.training import Case, each, raw_pytorch, set_up, train, train_step

RANKS = {"single": 1, "fsdp-hybrid": 4}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", each(quick=("single", "ddp", "fsdp")))
def test_half_precision_stays_near_fp32(strategy: str, precision: str) -> None:
    case = Case(model="gpt", optimizer="sgd", micro_batches=4, options=(("precision", precision),))
    ours, full = (
        run_ranks(RANKS.get(strategy, 2), train, strategy, case)[0],
        raw_pytorch(Case(**{**vars(case), "options": ()})),
    )
    torch.testing.assert_close(ours.losses, full.losses, rtol=2e-2, atol=0)
    torch.testing.assert_close(ours.norms, full.norms, rtol=2e-2, atol=0)
    assert ours.losses != full.losses


def overflowing(world: CpuWorld, strategy: str) -> tuple[list[float], list[float], bool]:
    """Rank zero's gradient overflows in the second of four steps."""
    case = Case(model="mlp", micro_batches=world.world_size, options=(("precision", "fp16"),))
    made = set_up(world, strategy, case)
    scales, norms = [], []
    for step in range(4):
        before = made.state()["model/head.bias"].values.clone() if "model/head.bias" in made.state() else None
        if step == 1:
            with made.micro_batch(last=True):
                loss = models.loss_sum(made.model, models.batch("mlp", step, world.rank))
                made.backward(loss * (1e30 if world.rank == 0 else 1.0))
            norms.append(made.step().item())
            unchanged = before is None or torch.equal(before, made.state()["model/head.bias"].values)
        else:
            norms.append(train_step(world, made, case, step)[1])
        scales.append(made._loss_scale.value)
    return scales, norms, unchanged


@pytest.mark.parametrize("strategy", each())
def test_an_overflow_is_skipped_on_all_ranks_alike(strategy: str) -> None:
    for scales, norms, unchanged in run_ranks(RANKS.get(strategy, 2), overflowing, strategy):
        assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
        assert [torch.tensor(norm).isfinite().item() for norm in norms] == [True, False, True, True]
        assert unchanged
