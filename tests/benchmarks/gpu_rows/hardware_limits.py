"""What this very card can, at the temperature and power limit that it has now: matrix products, copies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from launch.reporting.mfu import peak_flops
from strategies.precision import AUTOCAST, set_matmul_precision
from tests.benchmarks.gpu_rows import GpuSettings, Measurement
from tests.benchmarks.gpu_rows.timing import seconds_per_call

SIZES = (4096, 8192, 16384)
"""of square matrices; the best counts"""
BYTES = 2**30
"""of a copy"""
COPIES = {
    "copy in device memory, read + write": ("device", "device"),
    "copy, pinned host memory to device": ("host", "device"),
    "copy, device to pinned host memory": ("device", "host"),
}


def rows(settings: GpuSettings) -> Iterator[Measurement]:
    """Sustained over a window, not the best moment: what a training can hope for."""
    for precision in ("bf16", "tf32", "fp32"):
        yield Measurement(
            section="limits",
            name=f"matrix product, {precision}",
            measure=partial(matmul_row, settings, precision),
        )
    for name, places in COPIES.items():
        yield Measurement(section="limits", name=name, measure=partial(copy_row, settings, *places))


def matmul_row(settings: GpuSettings, precision: str) -> dict[str, Any]:
    """TFLOP/s, and the share of what the data sheet says."""
    found = matmul_flops(settings, precision)
    peak = peak_flops(settings.device, precision)
    return {"rate": found / 1e12, "unit": "TFLOP/s", "mfu": found / peak if peak else None}


def copy_row(settings: GpuSettings, source: str, target: str) -> dict[str, Any]:
    """GB/s."""
    return {"rate": copy_bandwidth(settings, source, target) / 1e9, "unit": "GB/s"}


@cache
def matmul_flops(settings: GpuSettings, precision: str) -> float:
    """FLOP/s of matrix products of normal numbers (a card is faster on zeros)."""
    set_matmul_precision(precision)
    found = []
    for size in (64,) if settings.rehearse else SIZES:
        left, right = torch.randn(
            2, size, size, device=settings.device, dtype=AUTOCAST.get(precision, torch.float32)
        )
        seconds = seconds_per_call(
            partial(torch.mm, left, right, out=torch.empty_like(left)),
            settings.device,
            settings.seconds / len(SIZES),
        )
        found.append(2 * size**3 / seconds)
    return max(found)


@cache
def copy_bandwidth(settings: GpuSettings, source: str, target: str) -> float:
    """Bytes a second between `device` and `host` memory; within the device those that are read and those that
    are written.
    """
    size = 2**16 if settings.rehearse else BYTES
    buffers = [
        torch.empty(size, dtype=torch.uint8, device=settings.device)
        if phase == "device"
        else torch.empty(size, dtype=torch.uint8, pin_memory=settings.device != "cpu")
        for phase in (source, target)
    ]
    seconds = seconds_per_call(
        lambda: buffers[1].copy_(buffers[0], non_blocking=True),
        settings.device,
        settings.seconds / len(COPIES),
    )
    return (2 if source == target else 1) * size / seconds
