"""Checkpoints are saved in the background, and committed or absent."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import directory
from launch.checkpoint.manifest import MANIFEST_NAME, Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.writer import SaveError
from launch.reporting.console import Console
from launch.state.run import Run
from launch.training.loop import finish, save, train
from tests.launch.checkpoints import FIT_KEYS
from tests.launch.runs import (
    LoopParts,
    loop_parts,
    make_run,
    metric_values,
    read_metrics,
    single_rank,
    train_run,
)
from tests.ranks import CpuWorld, run_ranks


def test_saves_are_recorded_with_their_times(run_dir: Path) -> None:
    lines = [line for line in read_metrics(run_dir) if "checkpoint/blocking" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["checkpoint/bytes"] > 0 and line["checkpoint/write"] > 0 for line in lines)


def test_what_is_saved_is_the_state_at_its_step(tmp_path: Path) -> None:
    """Training goes on while it is written: the copy must be complete before the next step."""
    run = train_run(
        make_run(single_rank(), "Fit", *FIT_KEYS, "checkpoint.every=1", "checkpoint.keep=6"),
        tmp_path / "often",
    )
    for folder in directory.list_checkpoints(tmp_path / "often"):
        stopped = make_run(single_rank(), "Fit", *FIT_KEYS)
        stopped.stop_at = directory.step_of(folder)
        train_run(stopped, tmp_path / folder.name)
        again = directory.list_checkpoints(tmp_path / folder.name)[-1]
        assert Manifest.read(folder).files[0].digest == Manifest.read(again).files[0].digest
    assert run.progress.step == 6


def save_by_the_clock(world: CpuWorld, folder: Path) -> list[str]:
    argv = ("checkpoint.every=1000", "checkpoint.every_minutes=0.00001", "checkpoint.keep=9")
    train_run(make_run(world, "Fit", *FIT_KEYS, *argv), folder, period=0.0)
    return [path.name for path in directory.list_checkpoints(folder)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_saves_by_the_clock_too(tmp_path: Path, world_size: int) -> None:
    """By that of rank zero; several ranks agree a step later, and what was asked meanwhile has then been
    answered.
    """
    steps = run_ranks(world_size, save_by_the_clock, tmp_path)[0]
    assert steps == [f"step-{step:08d}" for step in range(world_size, 7, world_size)]


def save_when_overdue(world: CpuWorld, folder: Path) -> list[str]:
    run = make_run(world, "Fit", *FIT_KEYS, "checkpoint.every=1000", "checkpoint.keep=9")
    if world.rank == 0:
        folder.mkdir()
    parts = loop_parts(run, folder)
    parts.requests.consensus.period, parts.checkpoints.last_save_time = 0.0, -1e9
    train(run, *parts)
    finish(run, *parts)
    return [path.name for path in directory.list_checkpoints(folder)]


def test_by_the_clock_it_saves_once(tmp_path: Path) -> None:
    """What is heard of the clock is a step old: by then a save may have been asked for twice."""
    assert run_ranks(2, save_when_overdue, tmp_path / "run")[0] == ["step-00000002", "step-00000006"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_in_trouble(world: CpuWorld, folder: Path, trouble: str) -> tuple[list[str], list[str]]:
    """A save before, one during and one after some trouble; the checkpoints after the second and after the
    third.
    """
    run = make_run(world, "Fit", *FIT_KEYS)
    parts = loop_parts(run, folder, Console(world.rank == 0))
    step(run, parts)
    parts.metrics.checkpoint(parts.checkpoints.wait())
    if trouble == "vanished":
        directory.checkpoints_dir(folder).rename(folder / "elsewhere") if world.rank == 0 else None
        torch.distributed.barrier()
        step(run, parts)
        parts.metrics.checkpoint(parts.checkpoints.wait())
        torch.distributed.barrier()
        (folder / "elsewhere").rename(directory.checkpoints_dir(folder)) if world.rank == 0 else None
    else:
        with full_disk(100 if world.rank == 1 else 2**40):
            step(run, parts)
            parts.metrics.checkpoint(parts.checkpoints.wait())
    torch.distributed.barrier()
    during = [path.name for path in directory.checkpoints_dir(folder).iterdir()]
    torch.distributed.barrier()
    step(run, parts)
    finish(run, *parts)
    return during, [path.name for path in directory.list_checkpoints(folder)]


def step(run: Run, parts: LoopParts) -> None:
    run.progress.step += 1
    save(run, *parts)


@pytest.mark.parametrize("trouble", ["full", "vanished"])
def test_a_save_that_fails_costs_nothing_but_itself(tmp_path: Path, trouble: str) -> None:
    for during, after in run_ranks(2, save_in_trouble, tmp_path, trouble):
        assert during == ["step-00000001"], "what was saved before, and no remains"
        assert after == ["step-00000001", "step-00000003"]
    with Checkpoint(directory.list_checkpoints(tmp_path)[0]) as checkpoint:
        checkpoint.verify()


def test_a_run_whose_last_save_fails_does_not_end_well(tmp_path: Path) -> None:
    run = make_run(single_rank(), "Fit", *FIT_KEYS, "checkpoint.every=4", "steps=6")
    parts = loop_parts(run, tmp_path, Console(True))
    run.stop_at = 4
    train(run, *parts)
    finish(run, *parts)
    run.stop_at = None
    (file,) = directory.list_checkpoints(tmp_path)[0].glob("*.safetensors")
    with full_disk(file.stat().st_size - 1):  # metrics.jsonl is smaller
        train(run, *parts)
        with pytest.raises(
            SaveError, match=r"step 6 was not saved: File too large: .*A rank writes about 716 bytes"
        ):
            finish(run, *parts)
    assert [path.name for path in directory.list_checkpoints(tmp_path)] == ["step-00000004"]
    assert len(metric_values(tmp_path)) == 6


def test_the_format_is_open(run_dir: Path) -> None:
    """JSON, and files that the safetensors package reads."""
    for file in directory.list_checkpoints(run_dir)[-1].glob("*.safetensors"):
        assert all(tensor.ndim == 1 for tensor in load_file(file).values())
    found = json.loads((directory.list_checkpoints(run_dir)[-1] / MANIFEST_NAME).read_text())["manifest"]
    assert (found["step"], found["samples"]) == (6, 96)
    assert found["config"]["lr"] == 0.01
    assert found["optimizers"]["model"][0]["optimizer"] == "AdamW"
    weight = found["tensors"]["model/model/0.weight"]
    assert (weight["dtype"], weight["shape"], weight["cuts"], weight["files"]) == (
        "F32",
        [8, 5],
        [0, 20, 40],
        [0, 1],
    )
