"""`init=`: names that wrappers changed, ranks that differ, and the numbers under every strategy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.checkpoint import tensor_file
from launch.checkpoint.init_weights import load_initial_weights
from launch.checkpoint.name_matching import match_names
from launch.data.prefetch import group_micro_batches
from launch.training.loop import train_step
from tests.launch.checkpoint.test_init_weights import (
    Tensors,
    elsewhere,
    same,
    saved,
    tiny,
    unique,
    weights_of,
)
from tests.launch.processes import TINY, run_command
from tests.launch.tiny import FEATURES
from tests.ranks import CpuWorld, RanksFailed, run_ranks


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ("a.w b.w", "b.w a.w", "b.w a.w"),
        ("module.a.w", "a.w", "module.a.w"),
        ("a.w", "_orig_mod.a.w", "a.w"),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.w b._orig_mod.w", "a.w b.w", None),
        ("module.w w", "module.w w", None),
        ("module.module.w module.w", "module.w w", None),
        ("model.a.w model.b.w head.w", "a.w b.w head.w", None),
        ("a.w b.w head.w", "net.a.w net.b.w head.w", None),
        ("ema.a.w ema.b.w a.w", "a.w b.w", "ema.a.w ema.b.w"),
        ("module.a.w a.w", "a.w", "a.w"),
        ("x.y", "a.w", ""),
    ],
)
def test_names(there: str, here: str, expected: str | None) -> None:
    found, _ = match_names({name: (2,) for name in there.split()}, {name: (2,) for name in here.split()})
    expected = there if expected is None else expected
    assert [found.pairs[name] for name in here.split() if name in found.pairs] == expected.split()


def test_of_two_prefixes_the_one_that_fits_by_shape() -> None:
    there = {"a.w": (2, 3), "b.w": (4, 5)}
    found, rival = match_names(there, {"w": (4, 5)})
    assert found.pairs == {"w": "b.w"}
    assert not rival
    assert "'module.'" in match_names({"_orig_mod.w": (2,), "module.w": (2,)}, {"w": (2,)})[1]


def init_where_it_is(world: CpuWorld, folder: Path) -> None:
    """The file is on the disk of rank zero only."""
    run = tiny("Tied", "strategy=ddp", place=world)
    here = folder / f"disk-{world.rank}"
    here.symlink_to(folder / "there") if world.rank == 0 else here.mkdir()
    (folder / "there").mkdir(exist_ok=True)
    if world.rank == 0:
        saved(here / "a.pt", elsewhere().state_dict())
    before = Path.cwd()
    try:
        os.chdir(here)
        load_initial_weights(run, "a.pt")
    finally:
        os.chdir(before)


def test_a_problem_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, init_where_it_is, tmp_path)
    assert all("there is no such file" in text for text in failed.value.errors.values())
    assert len(failed.value.errors) == 2


# under every strategy ---------------------------------------------------------------------------------------


@dataclass
class Begun:
    weights: Tensors
    read: int
    """bytes read from the file by this rank"""
    losses: list[float]


def begun(world: CpuWorld, strategy: str, path: Path) -> Begun:
    """The weights as loaded, and two steps: the first shows what is computed with, the second what the
    optimizer updates.
    """
    run = tiny("Tied", f"strategy={strategy}", place=world)
    read, counted = 0, tensor_file.empty_tensor

    def counting(dtype: str, numel: int) -> tuple[Tensor, memoryview]:
        nonlocal read
        read += numel * tensor_file.ITEM_SIZES[dtype]
        return counted(dtype, numel)

    tensor_file.empty_tensor = counting
    try:
        load_initial_weights(run, str(path))
    finally:
        tensor_file.empty_tensor = counted
    weights = {name: tensor.clone() for name, tensor in weights_of(run).items()}
    losses = []
    for batches, _ in zip(
        group_micro_batches(run.train_loader(), run.batch_plan.accumulation_steps), range(2), strict=False
    ):
        losses.append(run.reduced_losses(train_step(run, batches)[0])["model"].item())
        run.progress.step += 1
    return Begun(weights, read, losses)


def by_hand(model: nn.Module) -> list[float]:
    """The same two steps in raw PyTorch."""
    run, losses = tiny("Tied"), []
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 0.005}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    for batches, _ in zip(
        group_micro_batches(run.train_loader(), run.batch_plan.accumulation_steps), range(2), strict=False
    ):
        parts = [(model(inputs) - targets).square().sum() / 8 for inputs, targets in batches]
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return losses


STRATEGIES = [
    pytest.param(
        strategy,
        ranks,
        id=strategy,
        marks=[] if strategy in ("single", "fsdp", "zero3") else [pytest.mark.slow],
    )
    for strategy, ranks in (("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2))
]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize(("strategy", "ranks"), STRATEGIES)
def test_each_rank_reads_what_it_keeps_and_trains_with_it(
    tmp_path: Path, strategy: str, ranks: int, name: str
) -> None:
    held = unique(elsewhere())
    path = saved(tmp_path / name, held)
    found = run_ranks(ranks, begun, strategy, path)
    same(found[0].weights, held)
    for each in found:
        assert each.losses == pytest.approx(by_hand(elsewhere()), rel=1e-5)
    if name == "a.safetensors":
        size = sum(tensor.nbytes for tensor in held.values())
        assert all(each.read <= size * (1.0 if strategy in ("single", "ddp") else 0.6) for each in found)
        assert sum(each.read for each in found) >= size


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    save_file({"0.weight": torch.full((8, FEATURES), 0.25)}, tmp_path / "a.safetensors")
    words = (f"recipe={TINY}:Fit", "steps=2", "batch_size=8", "init=a.safetensors", "run_dir=run")
    refused = run_command(*words, cwd=tmp_path, ranks=2)
    assert refused.returncode != 0
    assert len(refused.messages) == 1
    assert "not in the file: 3 (0.bias, 4.weight, 4.bias)" in refused.messages[0]
    assert not (tmp_path / "run").exists()
    ended = run_command(*words, "init_partial=true", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "weights from a.safetensors (1 of 4 tensors" in ended.stdout
