"""`init=`: weights from elsewhere into a new run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from launch.checkpoint.init_weights import load_initial_weights
from tests.launch.checkpoint.pretrained import (
    Tensors,
    Wide,
    assert_same,
    prefixed,
    pretrained,
    saved,
    tiny,
    unique,
    weights_of,
)
from tests.launch.runs import single_rank, train_run
from tests.launch.tiny import FEATURES
from tests.ranks import CpuWorld, RanksFailed, run_ranks


def train_at(world: CpuWorld, recipe: str, strategy: str, folder: Path) -> Tensors:
    return weights_of(train_run(tiny(recipe, f"strategy={strategy}", world=world), folder))


def init_at(world: CpuWorld, recipe: str, strategy: str, path: Path, *argv: str) -> tuple[str, Tensors]:
    run = tiny(recipe, f"strategy={strategy}", *argv, world=world)
    message = load_initial_weights(run, str(path))
    return message, weights_of(run)


def test_a_run_or_its_checkpoint(tmp_path: Path) -> None:
    expected = run_ranks(2, train_at, "Two", "fsdp", tmp_path)[0]
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    for path in (tmp_path, checkpoints[-1]):
        message, loaded = run_ranks(2, init_at, "Two", "ddp", path)[0]
        assert str(checkpoints[-1]) in message
        assert_same(loaded, expected)
    # one model of two; and a model that ties no longer what was tied
    message, loaded = init_at(single_rank(), "Untied", "single", tmp_path, "init_partial=true")
    assert (
        "12 of 12 tensors, its names without 'student.'; "
        "not used by the model: 2 (teacher.bias, teacher.weight)" in message
    )
    assert all(torch.equal(loaded[name], expected[f"student.{name}"]) for name in unique(pretrained()))
    assert torch.equal(loaded["head.weight"], expected["student.module.weight"])
    file = next(checkpoints[-1].glob("rank-00001*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, init_at, "Two", "ddp", tmp_path)
    assert all(f"{file} is damaged" in text for text in failed.value.errors.values())
    assert len(failed.value.errors) == 2


def test_one_model_of_several(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", unique(pretrained()))
    before = weights_of(tiny("Two"))
    with pytest.raises(
        ValueError,
        match=r"its names put under 'student.'; not in the file: 2 \(teacher.weight, teacher.bias\)",
    ):
        init_at(single_rank(), "Two", "single", path)
    _, loaded = init_at(single_rank(), "Two", "single", path, "init_partial=true")
    assert_same(loaded, before | prefixed("student.", unique(pretrained())))
    with pytest.raises(ValueError, match=r"fits in two ways, .*'student.' and .*'teacher.'"):
        init_at(single_rank(), "Twins", "single", path, "init_partial=true")
    torch.manual_seed(3)
    both = {"student": pretrained().state_dict(), "teacher": nn.Linear(FEATURES, 1).state_dict()}
    message, loaded = init_at(single_rank(), "Two", "single", saved(tmp_path / "both.pt", both))
    assert "both.pt[student, teacher] (13 of 13 tensors)" in message
    assert_same(loaded, prefixed("student.", unique(pretrained())) | prefixed("teacher.", both["teacher"]))


# what does not fit ------------------------------------------------------------------------------------------


def other_head(model: Wide) -> Tensors:
    """As after another task: another head, one more layer, one less."""
    tensors = unique(model) | {"out.weight": torch.zeros(7, 33), "extra.weight": torch.ones(2)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in ("stem.bias", "norm.num_batches_tracked")
    }


def test_differences_are_listed_and_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", other_head(pretrained()))
    with pytest.raises(ValueError, match="fits") as refused:
        load_initial_weights(tiny("Tied"), str(path))
    assert str(refused.value).endswith(
        "a.safetensors: it fits 8 of 10 tensors; not in the file: 1 (stem.bias); not used by the model: 1 "
        "(extra.weight); of another shape: 1 (out.weight 1 x 33, in the file 7 x 33). "
        "If that is meant, say init_partial=true"
    )
    run = tiny("Tied", "init_partial=true")
    before = weights_of(run)
    assert "8 of 10 tensors; not in the file: 1 (stem.bias)" in load_initial_weights(run, str(path))
    kept = ("stem.bias", "out.weight", "norm.num_batches_tracked")
    assert_same(
        weights_of(run),
        {name: before[name] if name in kept else t for name, t in unique(pretrained()).items()},
    )


def test_the_counter_of_batchnorm_may_be_missing(tmp_path: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in pretrained().state_dict().items()
        if name != "norm.num_batches_tracked"
    }
    assert "(10 of 10 tensors)" in load_initial_weights(tiny("Tied"), str(saved(tmp_path / "a.pt", tensors)))
