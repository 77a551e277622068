"""The raw loop against rankzero in its fastest variant, both under one strategy on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from launch.cli.config import CheckpointOptions, Config
from launch.cli.resolve import Settings
from launch.reporting.console import Console
from launch.reporting.throughput import peak_memory
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import process_group
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import finish, train
from launch.watchdog.watchdog import Watchdog
from tests.benchmarks.benchmark_report import interleave, ratios
from tests.benchmarks.gpu_rows import LEFT_OUT, WRONG, GpuSettings, Measurement
from tests.benchmarks.gpu_rows.gpu_workloads import GpuWorkload
from tests.benchmarks.gpu_rows.optimizations import (
    LOSS_TOLERANCE,
    NEVER,
    fastest,
    max_relative_difference,
    speed,
    train_raw,
    with_fitting_batch,
)
from tests.benchmarks.gpu_rows.timing import free_gpu_memory, timed_window
from tests.benchmarks.loops import CLIP_NORM
from tests.benchmarks.loops.paired_runs import redirect_output
from tests.launch.runs import LoopParts, loop_parts

COMPARISONS = (("gpt", "single"), ("gpt", "ddp"), ("gpt", "fsdp"), ("gpt", "zero2"), ("resnet", "single"))
AIM = "<= 1.005"


def rows(settings: GpuSettings) -> Iterator[Measurement]:
    """A row a pair."""
    for kind, strategy in COMPARISONS:
        yield Measurement(
            section="loop",
            name=f"{kind}, {strategy}",
            measure=partial(measure_overhead, settings, kind, strategy),
            aim=AIM,
        )


def measure_overhead(settings: GpuSettings, kind: str, strategy: str) -> dict[str, Any]:
    """Step times of both, their ratio, and the difference of their losses; no ratio if that is too large."""
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        return {"note": f"{LEFT_OUT}: deepspeed is not installed"}
    chatter = redirect_output if strategy.startswith("zero") else nullcontext
    with (
        process_group(World(), strategy) as world,
        TemporaryDirectory() as folder,
        chatter(Path(folder) / "output"),
    ):
        pairs = with_fitting_batch(
            fastest(settings, kind), partial(interleaved_runs, settings.rounds, strategy, world, Path(folder))
        )
    theirs, mine = zip(*pairs, strict=True)
    losses = max(max_relative_difference(a.first_losses, b.first_losses) for a, b in pairs)
    expected = "whole" if strategy in ("single", "ddp") else strategy
    if wrong := {workload.sharding for workload in (*theirs, *mine)} - {expected}:
        return {"note": f"{WRONG}: was asked for {strategy}, holds the model {', '.join(wrong)}"}
    if not losses <= LOSS_TOLERANCE[kind]:
        return {"losses": losses, "note": f"{WRONG}: {losses:.0e} from the losses of the raw loop"}
    seconds = median(workload.step_seconds[0] for workload in mine)
    return {
        **speed(settings, kind, mine[0], seconds),
        "raw_ms": median(workload.step_seconds[0] for workload in theirs) * 1e3,
        **ratios([(a.step_seconds[0], b.step_seconds[0]) for a, b in pairs]),
        "losses": losses,
        "memory_gb": max(workload.peak for workload in mine) / 1e9,
        "raw_memory_gb": max(workload.peak for workload in theirs) / 1e9,
    }


def interleaved_runs(
    rounds: int, strategy: str, world: World, folder: Path, workload: GpuWorkload
) -> list[tuple[GpuWorkload, GpuWorkload]]:
    """Pairs (raw, rankzero); what the first has compiled serves all."""
    return interleave(
        partial(train_raw, workload, strategy),
        partial(train_rankzero, workload, strategy, world, folder),
        rounds,
    )


def train_rankzero(workload: GpuWorkload, strategy: str, world: World, folder: Path) -> GpuWorkload:
    """The workload, once `launch.training.loop.train` has trained it."""
    workload = replace(workload)
    free_gpu_memory(workload.device)
    with run_of(workload, strategy, world, folder) as (run, parts):
        parts.checkpoints.reserve = lambda: None  # type: ignore[method-assign]  # once a run
        steps = run.train_steps
        window = partial(timed_window, device=workload.device, seconds=workload.seconds)
        run.train_steps = lambda: window(steps(), step_seconds=workload.step_seconds)  # type: ignore[method-assign]
        train(run, *parts)
        workload.peak = peak_memory(workload.device)
    return workload


@contextmanager
def run_of(
    workload: GpuWorkload, strategy: str, world: World, folder: Path, **checkpoint: Any
) -> Iterator[tuple[Run, LoopParts]]:
    """A run as `launch.training.trainer` puts it together, with a line on its screen each ten steps, that
    saves only if it is told to.
    """
    config = Config(
        recipe="workload",
        strategy=strategy,  # type: ignore[arg-type]  # one of them
        batch_size=workload.batch,
        steps=NEVER,
        precision=workload.precision,  # type: ignore[arg-type]
        compile=workload.compiled,
        clip_norm=CLIP_NORM,
        checkpoint=CheckpointOptions(every=NEVER, every_minutes=None, **checkpoint),
    )
    torch.backends.cudnn.benchmark = False  # torch's default: a run of rankzero leaves it so
    phase, run_dir = Phase(), Path(mkdtemp(dir=folder))
    watchdog = Watchdog(world, phase, config.hang_timeout)
    try:
        with (run_dir / "screen").open("w") as console:
            run = prepare(Settings(config, workload), world, phase)
            parts = loop_parts(run, run_dir, Console(True, stream=console))
            yield run, parts
            finish(run, *parts)
            parts.metrics.close()
    finally:
        watchdog.close()
