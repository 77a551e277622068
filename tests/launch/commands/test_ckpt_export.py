"""`ckpt export` and `ckpt prune`: what they write, remove and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import directory
from launch.checkpoint.directory import checkpoint_dir
from launch.checkpoint.reader import Checkpoint
from tests.launch.checkpoints import (
    WEIGHTS,
    call,
    damage,
    shorten,
    state,
    write_checkpoint,
    write_run_with_best,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, of which the first is the best."""
    return write_run_with_best(tmp_path / "run")


# export -----------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_not_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint_dir(run, 30) / "rank-00001.safetensors")
    assert "rank-00001.safetensors is damaged" in call(
        capsys, "export", run, f"to={run / 'w.safetensors'}", expect=1
    )
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    call(capsys, "export", checkpoint_dir(run, 20), f"to={run / 'w.safetensors'}")


def test_export_of_several_models(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(run / "two", state("student", WEIGHTS) | state("teacher", WEIGHTS))
    output = call(capsys, "export", folder, f"to={run / 'w.safetensors'}", "shard_gb=1e-7")
    index = run / "w.safetensors.index.json"
    assert f'accelerate.load_checkpoint_in_model(torch.nn.ModuleDict(models), "{index}")' in output
    output = call(capsys, "export", folder, f"to={run / 't.safetensors'}", "model=teacher", "dtype=fp16")
    loaded = load_file(run / "t.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items() if name != "count"} == {
        "layer.weight": torch.float16,
        "layer.bias": torch.float16,
    }
    assert f'safetensors.torch.load_model(model, "{run / "t.safetensors"}")' in output


# prune ------------------------------------------------------------------------------------------------------


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (40, 50):
        write_checkpoint(
            checkpoint_dir(run, step),
            WEIGHTS,
            step=step,
            config={"checkpoint": {"best": True}},
            progress={"best_step": 10},
        )
    with Checkpoint(checkpoint_dir(run, 20)):
        output = call(capsys, "prune", run, "keep=2").splitlines()
    assert [line.split()[0] for line in output] == ["kept", "kept", "removed", "kept", "kept"]
    assert output[0].endswith("step-00000010, the best")
    assert output[1].endswith("step-00000020, a process reads it")
    assert [directory.step_of(folder) for folder in directory.list_checkpoints(run)] == [
        10,
        20,
        40,
        50,
    ]
    call(capsys, "prune", run, "keep=9")
    assert len(directory.list_checkpoints(run)) == 4


def test_prune_leaves_something_to_go_on_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "keep=0 must be 1 or more" in call(capsys, "prune", run, "keep=0", expect=2)
    shorten(checkpoint_dir(run, 30) / "rank-00002.safetensors")
    assert "would keep no intact checkpoint (rank-00002.safetensors" in call(
        capsys, "prune", run, "keep=1", expect=2
    )
    assert len(directory.list_checkpoints(run)) == 3
    call(capsys, "prune", run, "keep=2")
    assert [directory.step_of(folder) for folder in directory.list_checkpoints(run)] == [
        10,
        20,
        30,
    ]  # the first is the best
