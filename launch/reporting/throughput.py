"""How fast a run is, and what holds it up: step times, waiting for data, model FLOP/s, memory, the parts of
the start.
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
from launch.runtime.collectives import all_gather_rows
from launch.runtime.restarts import REEXEC_TIME
from recipes.base import local_num_items

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch

PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    "H100 NVL": {"bf16": 835e12, "fp16": 835e12, "tf32": 417.5e12, "fp32": 60e12},
    "H100": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H200": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "A10": {"bf16": 125e12, "fp16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "L4": {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
}
"""FLOP/s by a word in the device's name, the more special first: NVIDIA's data sheets, without sparsity"""
RESOLUTION = 1.01
"""ratio of neighbouring step times that are told apart"""
SLOW_DATA = 0.05
"""share of the time from which waiting for data is worth a word"""


class StepTimes:
    """Percentiles of step times, to 1 %, in constant memory."""

    def __init__(self) -> None:
        self.counts = Counter[int]()

    def add(self, seconds: float, steps: int = 1) -> None:
        """`steps` steps of about `seconds` each."""
        self.counts[round(math.log(max(seconds, 1e-9), RESOLUTION))] += steps

    def below(self, share: float) -> float:
        """The seconds that this share of the steps took at most; 0 without any."""
        missing = share * self.counts.total()
        for key in sorted(self.counts):
            missing -= self.counts[key]
            if missing <= 0:
                return float(RESOLUTION**key)
        return 0.0


class Throughput:
    """Of the training steps of one life of a run; on a GPU a step's time is the mean over the interval of a
    log line.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.times = run, StepTimes()
        self.waited = self.busy = 0.0
        """seconds of waiting for data, and of all steps; without the first"""
        self.began = 0.0
        self.first: Batch | None = None
        """a micro-batch without its data: shapes and types"""
        self.units = 1.0
        """what the recipe counts (tokens), in a sample: of the first micro-batch"""

    def watch(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Pass on the micro-batches of each step, and take the time that they were waited for."""
        while True:
            self.began = time.perf_counter()
            batches = next(steps, None)
            if batches is None:
                return
            if self.first is None:
                self.first = map_tensors(batches[0], lambda tensor: tensor.to("meta"))
                self.units = (
                    float(local_num_items(self.run.recipe, batches[0])) / self.run.batch_plan.micro_batch_size
                )
            else:
                self.waited += time.perf_counter() - self.began
            yield batches

    def stepped(self, first: bool) -> None:
        """A step has been made; the first of a life warms up, and is not counted."""
        seconds = time.perf_counter() - self.began
        if not first:
            self.busy += seconds
            if self.run.world.device == "cpu":
                self.times.add(seconds)

    def logged(self, seconds: float, steps: int) -> None:
        """So many steps came to an end on the device, in so many seconds."""
        if self.run.world.device != "cpu":
            self.times.add(seconds / steps, steps)

    def in_words(self) -> Iterator[str]:
        """For the summary. Every rank calls it."""
        usual, tail = self.times.below(0.5), self.times.below(0.99)
        memory = float(
            all_gather_rows(torch.tensor([peak_memory(self.run.world.device)], dtype=torch.float64)).max()
        )
        if usual:
            waiting = self.waited / max(self.busy, 1e-9)
            advice = f": {self.advice()}" if waiting > SLOW_DATA else ""
            times = f"step {duration(usual)}, 99 % of them within {duration(tail)}"
            yield f"{times}; {waiting:.1%} of the time waiting for data{advice}"
        flops = self.flops() if usual and self.run.world.rank == 0 else None
        if flops is not None:
            each = flops * self.run.batch_plan.accumulation_steps / usual
            peak = peak_flops(self.run.world.device, self.run.config.precision)
            unit, name = (1e12, "TFLOP/s") if each > 1e12 else (1e9, "GFLOP/s")
            share = f", {each / peak:.1%} of what the device can (MFU)" if peak else ""
            yield f"model {each / unit:,.3g} {name} a rank{share}"
        yield f"peak memory {memory / 1e9:,.2f} GB" + (
            " on the fullest rank" if self.run.world.world_size > 1 else ""
        )

    def advice(self) -> str:
        """What may help when data are waited for."""
        many = self.run.workers(self.run.splits.train)
        if many:
            return f"workers={2 * many} (now {many} a rank), if there are CPUs left; or data in memory (a TensorDataset)"
        return "its loading takes part in the step; workers=2 takes it out, if there are CPUs left"

    def flops(self) -> float | None:
        """Floating-point operations of one micro-batch, forward and backward; None where the model needs real
        numbers to run.

        Counted by torch's FlopCounterMode on a model and a batch without data: it costs no memory, and sees
        the plain model under every strategy. What activation checkpointing computes again is not counted.
        """
        from torch.utils.flop_counter import FlopCounterMode

        recipe = self.run.recipe
        try:
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                models = {name: build() for name, build in recipe.models().items()}
                for name, loss in recipe.losses().items():
                    for other, model in models.items():
                        model.requires_grad_(other == name)
                    loss(models, self.first).backward()  # type: ignore[no-untyped-call]  # torch has left it so
        except (
            Exception
        ):  # whatever a recipe's code says to tensors without data: no figure is worth the end of a run
            return None
        return float(counter.get_total_flops())


class Start:
    """The parts of the time from the command to the first step."""

    def __init__(self) -> None:
        self.last, self.parts = 0.0, dict[str, float]()

    def reached(self, part: str) -> None:
        """`part` has come to its end."""
        now = age()
        self.parts[part], self.last = now - self.last, now

    def __str__(self) -> str:
        return f"{self.last:.1f} s: " + ", ".join(
            f"{name} {seconds:.1f}" for name, seconds in self.parts.items()
        )


def age() -> float:
    """Seconds since this process was started, or has last replaced itself."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    born = float(os.environ.get(REEXEC_TIME, 0)) or int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born


def duration(seconds: float) -> str:
    """Three digits of it."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: of the GPU if it has one, else of the host."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def peak_flops(device: str, precision: str) -> float | None:
    """What the device can at most, in FLOP/s; None if we do not know it."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(precision) for word, peaks in PEAKS.items() if word in name), None)
