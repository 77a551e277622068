"""Retention: which checkpoints of a run are kept, and which are removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from launch.checkpoint import directory
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from tests.launch.checkpoints import FIT_KEYS
from tests.launch.runs import (
    loop_parts,
    make_run,
    single_rank,
    train_run,
)


def test_what_is_being_read_is_not_removed(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    older, newest = directory.list_checkpoints(tmp_path / "run")
    with Checkpoint(older):
        assert directory.prune(tmp_path / "run", keep=1) == []
    assert directory.prune(tmp_path / "run", keep=1) == [older]
    assert sorted(path.name for path in directory.checkpoints_dir(tmp_path / "run").iterdir()) == [
        newest.name
    ]


def test_the_newest_is_kept_though_it_is_not_of_the_highest_step(run_dir: Path, tmp_path: Path) -> None:
    """A run that went back must not lose its only good checkpoint to a newer one that is damaged."""
    shutil.copytree(run_dir, tmp_path / "run")
    os.truncate(directory.list_checkpoints(tmp_path / "run")[-1] / "rank-00000.safetensors", 10)
    run = make_run(single_rank(), "Fit", *FIT_KEYS, "checkpoint.every=5", "checkpoint.keep=1")
    resume(run, tmp_path / "run")
    run.stop_at = 5
    train_run(run, tmp_path / "run")
    assert [path.name for path in directory.list_checkpoints(tmp_path / "run")] == ["step-00000005"]


def test_partial_checkpoints_are_removed(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    for name in (".step-00000008.partial", ".step-00000002.removed"):
        (directory.checkpoints_dir(tmp_path / "run") / name).mkdir()
        (directory.checkpoints_dir(tmp_path / "run") / name / "rank-00000.safetensors").write_bytes(
            b"half of i"
        )
    run = make_run(single_rank(), "Fit", *FIT_KEYS)
    resume(run, tmp_path / "run")
    assert run.progress.step == 6
    loop_parts(make_run(single_rank(), "Fit", *FIT_KEYS), tmp_path / "run")
    assert sorted(path.name for path in directory.checkpoints_dir(tmp_path / "run").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
