"""How a GPU is timed: the host waits for the device at both ends of a window of steps, never within it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import TypeVar

import torch

WARM_UP = 5
"""steps that do not count: compilation, first allocations"""
PROBE = 3
"""steps that tell how many make a window, and the least that one has"""

Item = TypeVar("Item")


def synchronized_time(device: str) -> float:
    """The time at which the device has done all that it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_window(
    items: Iterator[Item], device: str, seconds: float, step_seconds: list[float]
) -> Iterator[Item]:
    """Pass `items` on, one a step: some to warm up, some to learn the pace, then as many as take
    about `seconds`.

    Appends to `step_seconds` the seconds that a step of the last took. Whoever asks for the next item has
    asked the device for all of the step before: that holds of the data of any training loop.
    """
    yield from islice(items, WARM_UP)
    many = PROBE
    for last in (False, True):
        start = synchronized_time(device)
        yield from islice(items, many)
        seconds_per_call = (synchronized_time(device) - start) / many
        many = max(round(seconds / seconds_per_call), PROBE)
        if last:
            step_seconds.append(seconds_per_call)


def seconds_per_call(work: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds that a call of `work` takes."""
    found: list[float] = []
    for _ in timed_window(repeat(None), device, seconds, found):
        work()
    return found[0]


def free_gpu_memory(device: str) -> None:
    """Give back the GPU memory of what ran before, and forget its peak."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
