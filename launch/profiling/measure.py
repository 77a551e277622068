"""Steps of a run under torch's profiler: the real ones, on the real data, on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launch.profiling.events import PHASE, phases_of, split_of, steps_of
from launch.reporting.throughput import peak_memory
from launch.runtime.collectives import all_gather_rows, barrier
from launch.runtime.phase import Phase
from launch.training.loop import manual_gc, set_learning_rate, train_step

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

    from launch.state.run import Run
    from recipes.parts.data import Batch


@dataclass
class Phases(Phase):
    """A place that marks its phases for the profiler while it is `recording`."""

    recording: bool = False
    mark: record_function | None = None

    def enter(self, name: str) -> None:
        """Go on to the phase `name`."""
        super().enter(name)
        self.leave()
        if self.recording:
            self.mark = record_function(PHASE + name)
            self.mark.__enter__()  # type: ignore[no-untyped-call]  # torch has left it so

    def leave(self) -> None:
        """The phase is over, and none follows at once."""
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None


class Figures(NamedTuple):
    """Of one rank and one step, in milliseconds, but for the last."""

    plain: float
    """without the profiler"""
    step: float
    """with it; all that follow are parts of this one"""
    computing: float
    communication: float
    exposed: float
    copies: float
    exposed_copies: float
    idle: float
    data: float
    forward: float
    backward: float
    update: float
    memory: float
    """bytes at most"""


def measured(run: Run, phase: Phases, warmup: int, steps: int) -> tuple[profile, float]:
    """The profiler after `steps` steps that it has seen, and the seconds that one took, of as many, without
    it before.

    `warmup` steps are made first and one more after the profiler has been started; they do not count.
    """
    # one more than are made: the last one too has the batches of a next one made ready beside it
    run.stop_at = warmup + 2 * steps + 2
    run.total_steps = max(run.total_steps, run.stop_at)
    data = run.train_steps()
    gpu = run.world.device != "cpu"
    with manual_gc():
        for _ in range(warmup):
            make(run, data)
        settle(run)
        start = time.perf_counter()
        for _ in range(steps):
            make(run, data)
        settle(run)
        plain = (time.perf_counter() - start) / steps
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])],
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            acc_events=True,  # without it torch 2.11 warns that a second cycle would forget the first
        ) as profiler:
            make(run, data)
            barrier()
            settle(run)
            phase.recording = True
            for step in range(1, steps + 1):
                profiler.step()
                make(run, data)
                if step == steps:
                    settle(run)
                phase.leave()
            phase.recording = False
            profiler.step()
    return profiler, plain


def make(run: Run, data: Iterator[list[Batch]]) -> None:
    """One step, as `launch.training.loop.train` makes it."""
    run.phase.enter("data")
    batches = next(data)
    run.phase.enter(
        "forward"
    )  # which begins with what the ranks have to agree on: that is no waiting for data
    set_learning_rate(run)
    train_step(run, batches)
    run.progress.step += 1


def settle(run: Run) -> None:
    """Wait until the device has done what it was asked for."""
    if run.world.device != "cpu":
        torch.cuda.synchronize(run.world.device)


def figures(run: Run, events: Sequence[FunctionEvent], plain: float) -> list[Figures]:
    """The figures of each rank, on every rank: a few numbers are gathered, no events."""
    split, phases = split_of(events, run.world.device != "cpu"), phases_of(events)
    whole = split.computing + split.exposed + split.exposed_copies + split.idle
    times = [whole, *split, *(phases[name] for name in ("data", "forward", "backward", "step"))]
    steps = len(steps_of(events))
    mine = [plain * 1e3, *(time / steps / 1e3 for time in times), float(peak_memory(run.world.device))]
    return [Figures(*row) for row in all_gather_rows(torch.tensor(mine, dtype=torch.float64)).tolist()]
