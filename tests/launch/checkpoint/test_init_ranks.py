"""`init=`: on several ranks, and the numbers under every strategy."""

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
from launch.data.prefetch import group_micro_batches
from launch.training.loop import train_step
from tests.launch.checkpoint.pretrained import (
    Tensors,
    assert_same,
    pretrained,
    saved,
    tiny,
    unique,
    weights_of,
)
from tests.launch.processes import TINY, run_command
from tests.launch.tiny import FEATURES
from tests.ranks import CpuWorld, RanksFailed, run_ranks


def init_from_own_disk(world: CpuWorld, folder: Path) -> None:
    """The file is on the disk of rank zero only."""
    run = tiny("Tied", "strategy=ddp", world=world)
    disk = folder / f"disk-{world.rank}"
    disk.mkdir()
    if world.rank == 0:
        saved(disk / "a.pt", pretrained().state_dict())
    before = Path.cwd()
    try:
        os.chdir(disk)
        load_initial_weights(run, "a.pt")
    finally:
        os.chdir(before)


def test_a_problem_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, init_from_own_disk, tmp_path)
    assert all("there is no such file" in text for text in failed.value.errors.values())
    assert len(failed.value.errors) == 2


# under every strategy ---------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of a rank: the weights as loaded, and the losses of two steps."""

    weights: Tensors
    read: int
    """bytes read from the file by this rank"""
    losses: list[float]


def load_and_train(world: CpuWorld, strategy: str, path: Path) -> Outcome:
    """The weights as loaded, and two steps: the first shows what is computed with, the second what the
    optimizer updates.
    """
    run = tiny("Tied", f"strategy={strategy}", world=world)
    read, original = 0, tensor_file.empty_tensor

    def counting(dtype: str, numel: int) -> tuple[Tensor, memoryview]:
        nonlocal read
        read += numel * tensor_file.ITEM_SIZES[dtype]
        return original(dtype, numel)

    tensor_file.empty_tensor = counting
    try:
        load_initial_weights(run, str(path))
    finally:
        tensor_file.empty_tensor = original
    weights = {name: tensor.clone() for name, tensor in weights_of(run).items()}
    losses = []
    for batches, _ in zip(
        group_micro_batches(run.train_loader(), run.batch_plan.accumulation_steps), range(2), strict=False
    ):
        losses.append(run.reduced_losses(train_step(run, batches)[0])["model"].item())
        run.progress.step += 1
    return Outcome(weights, read, losses)


def train_in_torch(model: nn.Module) -> list[float]:
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
    expected = unique(pretrained())
    path = saved(tmp_path / name, expected)
    outcomes = run_ranks(ranks, load_and_train, strategy, path)
    assert_same(outcomes[0].weights, expected)
    for each in outcomes:
        assert each.losses == pytest.approx(train_in_torch(pretrained()), rel=1e-5)
    if name == "a.safetensors":
        size = sum(tensor.nbytes for tensor in expected.values())
        assert all(each.read <= size * (1.0 if strategy in ("single", "ddp") else 0.6) for each in outcomes)
        assert sum(each.read for each in outcomes) >= size


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    save_file({"0.weight": torch.full((8, FEATURES), 0.25)}, tmp_path / "a.safetensors")
    argv = (f"recipe={TINY}:Fit", "steps=2", "batch_size=8", "init=a.safetensors", "run_dir=run")
    refused = run_command(*argv, cwd=tmp_path, ranks=2)
    assert refused.returncode != 0
    assert len(refused.messages) == 1
    assert "not in the file: 3 (0.bias, 4.weight, 4.bias)" in refused.messages[0]
    assert not (tmp_path / "run").exists()
    ended = run_command(*argv, "init_partial=true", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "weights from a.safetensors (1 of 4 tensors" in ended.stdout
