"""A checkpoint that an older version wrote is continued: `data/` holds one of each format that is read.

It is of `tests.launch.tiny:Fit` after 3 of 6 steps, by FSDP on two ranks, before the modules of `launch/`
moved to their folders. The numbers are those of the run that wrote it, which was not interrupted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.checkpoint.manifest import FORMAT_VERSION, Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from tests.launch.runs import make_run, metric_values, train_run
from tests.ranks import CpuWorld, run_ranks

OLD = Path(__file__).with_name("data") / "checkpoints" / "step-00000003"
KEYS = ("held_out=6", "batch_size=16", "micro_batch_size=4", "steps=6", "checkpoint.every=3", "eval.every=2")
LOSSES = [2.0784084796905518, 0.9996095299720764, 2.7530441284179688]
GRAD_NORMS = [2.687375545501709, 1.3680386543273926, 3.2646191120147705]
EVAL_LOSSES = [2.6141606171925864, 2.358227292696635]


def continue_old(world: CpuWorld, strategy: str, run_dir: Path) -> int:
    """The rest of the run, in `run_dir`; returns the step from which on."""
    run = make_run(world, "Fit", *KEYS, f"strategy={strategy}", f"resume={OLD}")
    assert resume(run, run_dir) == OLD
    start = run.progress.step
    train_run(run, run_dir)
    return start


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp", 2), ("zero2", 2)])
def test_it_is_resumed_with_the_same_losses(tmp_path: Path, strategy: str, world_size: int) -> None:
    """Within 1e-5: another machine or number of ranks rounds otherwise."""
    assert run_ranks(world_size, continue_old, strategy, tmp_path) == [3] * world_size
    assert metric_values(tmp_path, "loss") == pytest.approx(LOSSES, rel=1e-5)
    assert metric_values(tmp_path, "grad_norm") == pytest.approx(GRAD_NORMS, rel=1e-5)
    assert metric_values(tmp_path, "eval/loss") == pytest.approx(EVAL_LOSSES, rel=1e-5)


def test_it_is_of_the_format_that_is_written_today() -> None:
    assert Manifest.read(OLD).format == FORMAT_VERSION
    with Checkpoint(OLD) as checkpoint:
        checkpoint.verify()
