"""The summary of a run that has finished: speed, scores, what checkpoints cost, where its weights are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from statistics import median_high

from rich.filesize import decimal

from launch.checkpoint.writer import SaveResult
from launch.reporting.console import Console, format_scores
from launch.reporting.metrics import Metrics
from launch.state.run import Run


def print_summary(console: Console, run: Run, metrics: Metrics, timing: Sequence[str]) -> None:
    """The lines of a run that has finished; on rank zero only."""
    seconds = time.perf_counter() - metrics.timer.started
    steps = run.progress.step - metrics.first_step
    early = " (stopped early)" if run.stopping_early else ""
    speed = steps * run.batch_plan.batch_size / max(seconds, 1e-9)
    console.print(
        f"done: step {run.progress.step}{early}, {run.epoch:.1f} epochs, "
        f"{timedelta(seconds=round(seconds))}, {speed:,.0f} samples/s"
    )
    if scores := format_scores(metrics.scores):
        console.print(f"  {scores}")
    for line in timing:
        console.print(f"  {line}")
    if metrics.saves:
        console.print(f"  {describe_saves(metrics.saves)}")
    if run.progress.best is not None:
        best = f"{run.progress.best:.4f} at step {run.progress.best_step}"
        console.print(f"  best eval/{run.recipe.monitor} {best}")
    console.print(f"  weights {metrics.run_dir / 'model.safetensors'}")


def describe_saves(saves: Sequence[SaveResult]) -> str:
    """What the checkpoints cost: the median times that training was blocked, and in the background."""
    blocking = median_high(save.blocking_s for save in saves)
    background = median_high(save.write_s for save in saves)
    return (
        f"{len(saves)} checkpoint(s) of {decimal(saves[-1].size)} per rank: {blocking:.3f} s blocking, "
        f"{background:.2f} s in the background"
    )
