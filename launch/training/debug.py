"""`debug=true`: the first steps of a run under anomaly detection. Used by the trainer alone; the loop does
not
know of it.

The steps are those of the run itself, under its own schedule: what goes wrong at step 5 of the run goes wrong
at step 5 here.
"""

from __future__ import annotations

import os
import pdb
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Subset

from launch.reporting.model_table import model_tables
from launch.state.batchnorm import RunningStatistics
from launch.state.build import build_strategies
from launch.state.run import Run
from launch.training.overfit import overfit
from launch.watchdog.exception_report import is_user_frame

if TYPE_CHECKING:
    from launch.cli.config import Config
    from launch.reporting.console import Console
    from recipes.parts.data import Dataset

STEPS = 8
"""steps of a debug run, unless `debug=N` says how many"""
EVAL_MICRO_BATCHES = 4
"""micro-batches of each evaluation"""


@contextmanager
def mode(config: Config, run_dir: Path) -> Iterator[None]:
    """Anomaly detection and deterministic algorithms for as long as the context lasts; nothing without
    `debug`.
    """
    if not config.debug:
        yield
        return
    if config.run_dir is None:
        shutil.rmtree(
            run_dir, ignore_errors=True
        )  # a folder of our own naming: the last debug run of this recipe
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call
    # only a warning: a recipe that needs an operation without a deterministic form should still be debugged
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # NaNs are looked for from the first step of the run on: `detect_nan_gradients`
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def examine(run: Run, console: Console) -> None:
    """Show each model, try to overfit one batch, then make `run` a short one. Leaves new models, as they were
    built first.
    """
    steps = STEPS if run.config.debug is True else run.config.debug
    run.stop_at = run.progress.step + steps
    run.splits.val, run.splits.test = (
        first_micro_batches(split, run) for split in (run.splits.val, run.splits.test)
    )
    if run.last_step == run.progress.step:
        console.print("  debug     the run is at its end: no step is left to look at")
        return
    console.print(
        f"  debug     steps {run.progress.step + 1} to {run.last_step}, {EVAL_MICRO_BATCHES} micro-batches "
        "of each evaluation; "
        "anomaly detection, deterministic algorithms"
    )
    if run.config.run_dir is None:
        console.print("            the next debug run of this recipe replaces the run directory")
    if run.config.compile:
        rebuild(
            run, replace(run.config, compile=False)
        )  # compiled blocks hide their parts, and take minutes for one batch
    batch = run.to_device(next(iter(run.train_loader())))
    for line in model_tables(run, batch):
        console.print(line)
    for line in overfit(run, batch):
        console.print(line)
    rebuild(run, run.config)
    # fp16 overflows on purpose until its loss scale has settled, and some recipes leave such steps out
    if run.config.precision != "fp16" and not run.recipe.skip_nonfinite:
        run.backward_context = detect_nan_gradients


def first_micro_batches(split: Dataset | None, run: Run) -> Dataset | None:
    """The first few micro-batches of a split."""
    if split is None:
        return None
    return Subset(split, range(min(len(split), EVAL_MICRO_BATCHES * run.batch_plan.micro_batch_size)))  # type: ignore[arg-type]


def rebuild(run: Run, config: Config) -> None:
    """Build the models of `run` again, under `config`. The old ones go first, to make room."""
    run.strategies, run.statistics = {}, RunningStatistics(())
    run.strategies = build_strategies(config, run.recipe, run.world)
    run.statistics = RunningStatistics(strategy.module for strategy in run.strategies.values())


def detect_nan_gradients(loss: Tensor) -> AbstractContextManager[object]:
    """Let the backward pass within name the operation whose gradient is the first NaN, if `loss` is finite.

    A NaN in the forward pass is left to the loop, which names the module; backward could only blame the loss
    function.
    """
    return torch.autograd.set_detect_anomaly(True, check_nan=bool(loss.isfinite()))


# after an exception -----------------------------------------------------------------------------------------


class Postmortem(pdb.Pdb):
    """pdb that begins in the user's own code, not where a library noticed what was wrong."""

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        """As in the base class; the index is that of the innermost frame that is not a library's."""
        stack, index = super().get_stack(f, t)
        return stack, next((i for i in range(len(stack) - 1, -1, -1) if is_user_frame(stack[i][0])), index)


def post_mortem(error: BaseException) -> None:
    """Let a person at a terminal look around where `error` came from; nothing without one."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    print(
        "rankzero: debug=true: pdb in the innermost frame of your own code; u and d move, p NAME prints, "
        "q ends",
        flush=True,
    )
    debugger = Postmortem()
    debugger.reset()
    debugger.interaction(None, error.__traceback__)
