"""Steps of a run under torch's profiler: the real ones, on the real data, on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launch.profiling.events import PHASE_PREFIX, break_down_steps, host_phase_times, step_marks
from launch.reporting.throughput import peak_memory
from launch.runtime.collectives import all_gather_rows, barrier
from launch.runtime.phase import Phase
from launch.training.loop import manual_gc, set_learning_rate, train_step

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

    from launch.state.run import Run
    from recipes.parts.data import Batch


@dataclass
class ProfiledPhase(Phase):
    """A phase that marks itself for the profiler while it is `recording`."""

    recording: bool = False
    mark: record_function | None = None

    def enter(self, name: str) -> None:
        """Begin the phase `name`."""
        super().enter(name)
        self.leave()
        if self.recording:
            self.mark = record_function(PHASE_PREFIX + name)
            self.mark.__enter__()  # type: ignore[no-untyped-call]  # torch has left it so

    def leave(self) -> None:
        """End the phase, with none that follows at once."""
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None


class RankStepTimes(NamedTuple):
    """Of one rank, for one step: in milliseconds, but for the last."""

    unprofiled_step: float
    """without the profiler"""
    step: float
    """with it; all that follow are parts of this one"""
    compute: float
    communication: float
    exposed_communication: float
    copies: float
    exposed_copies: float
    idle: float
    data: float
    forward: float
    backward: float
    optimizer_step: float
    peak_memory: float
    """in bytes"""


def profile_steps(run: Run, phase: ProfiledPhase, warmup: int, steps: int) -> tuple[profile, float]:
    """The profiler after `steps` steps that it has recorded, and the seconds that one step took before,
    without it (the mean of as many). All ranks call it.

    `warmup` steps are made first and one more after the profiler has been started; they do not count.
    """
    # one more than are made: the last one too has the batches of a next one prefetched beside it
    run.stop_at = warmup + 2 * steps + 2
    run.total_steps = max(run.total_steps, run.stop_at)
    data = run.train_steps()
    gpu = run.world.device != "cpu"
    with manual_gc():
        for _ in range(warmup):
            make_step(run, data)
        synchronize_device(run)
        start = time.perf_counter()
        for _ in range(steps):
            make_step(run, data)
        synchronize_device(run)
        unprofiled = (time.perf_counter() - start) / steps
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])],
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            acc_events=True,  # without it torch 2.11 warns that a second cycle would drop the first
        ) as profiler:
            make_step(run, data)
            barrier()
            synchronize_device(run)
            phase.recording = True
            for step in range(1, steps + 1):
                profiler.step()
                make_step(run, data)
                if step == steps:
                    synchronize_device(run)
                phase.leave()
            phase.recording = False
            profiler.step()
    return profiler, unprofiled


def make_step(run: Run, data: Iterator[list[Batch]]) -> None:
    """One step, as `launch.training.loop.train` makes it."""
    run.phase.enter("data")
    batches = next(data)
    run.phase.enter("forward")  # it begins with what the ranks have to agree on: that is no waiting for data
    set_learning_rate(run)
    train_step(run, batches)
    run.progress.step += 1


def synchronize_device(run: Run) -> None:
    """Wait until the GPU has finished."""
    if run.world.device != "cpu":
        torch.cuda.synchronize(run.world.device)


def gather_step_times(run: Run, events: Sequence[FunctionEvent], unprofiled_s: float) -> list[RankStepTimes]:
    """The times of each rank, on every rank. Collective: a few numbers are gathered, no events."""
    breakdown = break_down_steps(events, run.world.device != "cpu")
    phases = host_phase_times(events)
    window = breakdown.compute + breakdown.exposed_communication + breakdown.exposed_copies + breakdown.idle
    times_us = [window, *breakdown, *(phases[name] for name in ("data", "forward", "backward", "step"))]
    steps = len(step_marks(events))
    row = [
        unprofiled_s * 1e3,
        *(time / steps / 1e3 for time in times_us),
        float(peak_memory(run.world.device)),
    ]
    rows = all_gather_rows(torch.tensor(row, dtype=torch.float64)).tolist()
    return [RankStepTimes(*values) for values in rows]
