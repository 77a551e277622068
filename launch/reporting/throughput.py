"""How fast a run is: step times, throughput (samples or tokens per second), waiting for data, peak memory,
the parts of the start-up.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launch.data.batch import map_tensors
from launch.reporting.mfu import count_flops, peak_flops
from launch.runtime.collectives import all_gather_rows
from launch.runtime.restarts import REEXEC_TIME
from recipes.base import local_num_items

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch

RESOLUTION = 1.01
"""ratio of neighboring buckets of step times"""
SLOW_DATA = 0.05
"""fraction of the time from which waiting for data is worth an advice"""


class StepTimes:
    """Percentiles of step times, to 1 %, in constant memory: a histogram with buckets of equal ratio."""

    def __init__(self) -> None:
        self.counts = Counter[int]()

    def add(self, seconds: float, steps: int = 1) -> None:
        """Add `steps` steps of about `seconds` each."""
        self.counts[round(math.log(max(seconds, 1e-9), RESOLUTION))] += steps

    def percentile(self, fraction: float) -> float:
        """The seconds that this fraction of the steps took at most; 0 without any."""
        missing = fraction * self.counts.total()
        for key in sorted(self.counts):
            missing -= self.counts[key]
            if missing <= 0:
                return float(RESOLUTION**key)
        return 0.0


class StepTimer:
    """The times of the training steps of this process; on a GPU a step's time is the mean over a log
    interval.

    The first step warms up (compiles, allocates) and does not count.
    """

    def __init__(self, run: Run, startup: StartupTimer | None = None) -> None:
        self.run, self.startup, self.times = run, startup or StartupTimer(), StepTimes()
        self.steps = 0
        self.waited_s = self.busy_s = 0.0
        """waiting for data, and all of the steps"""
        self.step_start = 0.0
        self.started = self.interval_start = time.perf_counter()
        self.uncounted = 0
        """steps of the current interval that were made before it began"""
        self.samples_per_second = self.slowest_step_s = 0.0
        """over the last interval; the slowest interval's mean"""
        self.example: Batch | None = None
        """a micro-batch on the meta device: shapes and types without the data"""
        self.items_per_sample = 1.0
        """of the first micro-batch: tokens of a sample, say"""

    def data(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Pass on the micro-batches of each step, and measure how long they were waited for."""
        while True:
            self.step_start = time.perf_counter()
            batches = next(steps, None)
            if batches is None:
                return
            if self.example is None:
                self.example = map_tensors(batches[0], lambda tensor: tensor.to("meta"))
                items = float(local_num_items(self.run.recipe, batches[0]))
                self.items_per_sample = items / self.run.batch_plan.micro_batch_size
            else:
                self.waited_s += time.perf_counter() - self.step_start
            yield batches

    def step(self) -> None:
        """A step has been made."""
        seconds = time.perf_counter() - self.step_start
        self.steps += 1
        if self.steps == 1:
            self.warmed_up()
            return
        self.busy_s += seconds
        if self.run.world.device == "cpu":
            self.times.add(seconds)

    def warmed_up(self) -> None:
        """The first step has been made."""
        if self.run.world.device != "cpu":
            torch.cuda.synchronize()
        self.startup.reached("first step")
        seconds = time.perf_counter() - self.interval_start
        self.samples_per_second = self.run.batch_plan.batch_size / seconds
        self.interval_start, self.uncounted = time.perf_counter(), 1

    def interval(self, end: float, steps: int) -> None:
        """At `end`, by `time.perf_counter`, the device had made so many steps since the last interval."""
        counted = steps - self.uncounted
        seconds, self.interval_start, self.uncounted = end - self.interval_start, end, 0
        self.slowest_step_s = max(self.slowest_step_s, seconds / max(counted, 1))
        if not counted:
            return
        self.samples_per_second = counted * self.run.batch_plan.batch_size / seconds
        if self.run.world.device != "cpu":
            self.times.add(seconds / counted, counted)

    def restart(self) -> None:
        """A validation or a save is over: its time is no step's."""
        self.interval_start = time.perf_counter()

    def summary(self) -> Iterator[str]:
        """Lines for the end of a run: percentiles, waiting for data, FLOP/s and MFU, memory, start-up.
        Collective.
        """
        p50, p99 = self.times.percentile(0.5), self.times.percentile(0.99)
        device = self.run.world.device
        memory = float(all_gather_rows(torch.tensor([peak_memory(device)], dtype=torch.float64)).max())
        if p50:
            waiting = self.waited_s / max(self.busy_s, 1e-9)
            advice = f": {data_advice(self.run)}" if waiting > SLOW_DATA else ""
            times = f"step p50 {duration(p50)}, p99 {duration(p99)}"
            yield f"{times}; {waiting:.1%} of the time waiting for data{advice}"
        flops = count_flops(self.run.recipe, self.example) if p50 and self.run.world.rank == 0 else None
        if flops is not None:
            per_second = flops * self.run.batch_plan.accumulation_steps / p50
            peak = peak_flops(device, self.run.config.precision)
            scale, unit = (1e12, "TFLOP/s") if per_second > 1e12 else (1e9, "GFLOP/s")
            mfu = f", MFU {per_second / peak:.1%}" if peak else ""
            yield f"model {per_second / scale:,.3g} {unit} per rank{mfu}"
        fullest = ", the maximum over ranks" if self.run.world.world_size > 1 else ""
        yield f"peak memory {memory / 1e9:,.2f} GB{fullest}"
        if self.startup.parts:
            yield f"start-up {self.startup}"


def data_advice(run: Run) -> str:
    """What may help when the training waits for data."""
    workers = run.num_workers(run.splits.train)
    if workers:
        return (
            f"workers={2 * workers} (now {workers} per rank), if there are CPUs left; "
            "or data in memory (a TensorDataset)"
        )
    return "samples are loaded in the step itself; workers=2 loads them beside it, if there are CPUs left"


class StartupTimer:
    """The parts of the time from the command to the first step."""

    def __init__(self) -> None:
        self.last, self.parts = 0.0, dict[str, float]()

    def reached(self, part: str) -> None:
        """`part` has come to its end."""
        now = process_age()
        self.parts[part], self.last = now - self.last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"{self.last:.1f} s: {parts}"


def process_age() -> float:
    """Seconds since this process was started, or has last replaced itself."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    born = float(os.environ.get(REEXEC_TIME, 0)) or int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born


def duration(seconds: float) -> str:
    """A time with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: of the GPU if it has one, else of the host."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)
