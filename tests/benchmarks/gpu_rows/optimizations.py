"""The raw loop, faster variant by variant: each has one optimization more than the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from launch.reporting.mfu import count_flops, peak_flops
from launch.reporting.throughput import peak_memory
from recipes.base import local_num_items
from recipes.parts.data import Batch
from strategies.precision import set_matmul_precision
from tests.benchmarks.gpu_rows import WRONG, GpuSettings, Measurement
from tests.benchmarks.gpu_rows.gpu_workloads import GPT2, TILE, GpuWorkload
from tests.benchmarks.gpu_rows.hardware_limits import matmul_flops
from tests.benchmarks.gpu_rows.image_workloads import ResNet50, ViTS
from tests.benchmarks.gpu_rows.timing import free_gpu_memory
from tests.benchmarks.loops import Setting, raw_strategies

WORKLOADS: dict[str, type[GpuWorkload]] = {"gpt": GPT2, "resnet": ResNet50, "vit": ViTS}
OPTIMIZATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt": {
        "eager fp32": {"naive": True, "batch": 16},
        "+ tf32": {"precision": "tf32"},
        "+ bf16": {"precision": "bf16"},
        "+ SDPA": {"naive": False, "batch": 32},
        "+ compile": {"compiled": True, "batch": 64},
        "+ fused AdamW": {"fused": True},
        "+ vocabulary padded to 50,304": {"multiple": 128},
    },
    "resnet": {
        "eager fp32": {"fused": True, "batch": 256},
        "+ AMP (bf16)": {"precision": "bf16"},
        "+ channels_last": {"nhwc": True},
        "+ compile": {"compiled": True},
    },
    "vit": {
        "eager tf32": {"precision": "tf32", "fused": True, "batch": 256},
        "+ AMP (bf16)": {"precision": "bf16"},
        "+ compile": {"compiled": True},
    },
}
"""what each variant adds; batches that fit into 80 GB, as public code for such cards has them"""
AIMS = {"gpt": ">= 400,000", "resnet": ">= 3,700"}
"""of the fastest variant, on an H100"""
TOY_SIZES: dict[str, dict[str, Any]] = {
    "gpt": {"batch": 8, "samples": 64, "vocabulary": 255, "block": 32, "width": 64, "heads": 2, "layers": 2},
    "resnet": {"batch": 8, "samples": 64, "pixels": 16, "classes": 10, "toy": True},
    "vit": {"batch": 8, "samples": 64, "pixels": 32, "classes": 10, "toy": True},
}
LOSS_TOLERANCE = {"gpt": 2e-3, "resnet": 3e-2, "vit": 2e-3}
"""relative: what losses may differ by, in bf16 or against fp32; fifty BatchNorms blow rounding up"""
COMPARED_STEPS = 3
"""steps whose losses are compared"""
NEVER = 10**9

Found = TypeVar("Found")


def variants(settings: GpuSettings, kind: str) -> Iterator[tuple[str, GpuWorkload]]:
    """The variants of a model by name, in a rehearsal at toy sizes."""
    total: dict[str, Any] = {"device": settings.device, "seconds": settings.seconds}
    for name, added in OPTIMIZATIONS[kind].items():
        total |= added
        yield name, WORKLOADS[kind](**{**total, **(TOY_SIZES[kind] if settings.rehearse else {})})


def fastest(settings: GpuSettings, kind: str) -> GpuWorkload:
    """The last variant, which has all optimizations."""
    *_, (_, last) = variants(settings, kind)
    return last


def rows(settings: GpuSettings, kind: str) -> Iterator[Measurement]:
    """A row a variant."""
    before: list[tuple[GpuWorkload, float]] = []
    for name, workload in variants(settings, kind):
        aim = AIMS.get(kind) if workload == fastest(settings, kind) else None
        yield Measurement(
            section=kind,
            name=name,
            measure=partial(measure_variant, settings, kind, workload, before),
            aim=aim,
        )


def measure_variant(
    settings: GpuSettings, kind: str, workload: GpuWorkload, before: list[tuple[GpuWorkload, float]]
) -> dict[str, Any]:
    """The speed of a variant, its gain over the one in `before`, which it replaces; how far losses differ."""
    workload = with_fitting_batch(replace(workload, tiled=COMPARED_STEPS), train_raw)
    found = {**speed(settings, kind, workload, workload.step_seconds[0]), "memory_gb": workload.peak / 1e9}
    lower, rate = before.pop() if before else (workload, found["rate"])
    before.append((workload, found["rate"]))
    if lower is workload:
        return found
    losses = max_relative_difference(*(notes.first_losses[: notes.tiled] for notes in (lower, workload)))
    if not losses <= LOSS_TOLERANCE[kind]:  # nor if one is not a number
        return {"losses": losses, "note": f"{WRONG}: {losses:.0e} from the losses of the variant before"}
    return {**found, "gain": found["rate"] / rate, "losses": losses}


def train_raw(workload: GpuWorkload, strategy: str = "single") -> GpuWorkload:
    """The workload, once the raw loop has trained it."""
    workload = replace(workload)
    free_gpu_memory(workload.device)
    set_matmul_precision(workload.precision)
    torch.backends.cudnn.benchmark = True  # as one does for convolutions of one size
    raw_strategies.run(
        workload, NEVER, Setting(strategy=strategy, bare=False, rank=0, ranks=1, folder=Path())
    )
    workload.peak = peak_memory(workload.device)
    return workload


def with_fitting_batch(workload: GpuWorkload, run: Callable[[GpuWorkload], Found]) -> Found:
    """What `run` makes of the workload; of half of its batch if that does not fit into memory, and so on."""
    while True:
        # else torch would take a batch of another size for one that varies, and compile slower code for any
        # size
        torch.compiler.reset()
        try:
            return run(workload)
        except torch.OutOfMemoryError:
            if workload.batch // 2 < TILE:
                raise
        # only here, where nothing holds the frames of the failure any more, can their memory be used again
        workload = replace(workload, batch=workload.batch // 2)


def speed(settings: GpuSettings, kind: str, workload: GpuWorkload, seconds: float) -> dict[str, Any]:
    """Of a step of so many seconds: units a second, and the share of what the card can, by its data sheet and
    as measured.
    """
    flops = flops_of_sample(settings, kind) * workload.batch / seconds
    peak = peak_flops(settings.device, workload.precision)
    return {
        "batch": workload.batch,
        "ms": seconds * 1e3,
        "rate": local_num_items(workload, one_sample(workload)) * workload.batch / seconds,
        "unit": f"{workload.item_name}/s",
        "flops": flops,
        "mfu": flops / peak if peak else None,
        "of_product": flops / matmul_flops(settings, workload.precision),
    }


@cache
def flops_of_sample(settings: GpuSettings, kind: str) -> float:
    """Of forward and backward, by the first variant: padding is no work, nor is what is computed twice."""
    _, workload = next(variants(settings, kind))
    found = count_flops(workload, one_sample(workload))
    assert found is not None
    return found


def one_sample(workload: GpuWorkload) -> Batch:
    """A batch of one, without its data."""
    return [tensor.to("meta") for tensor in replace(workload, samples=1).rows()]


def max_relative_difference(theirs: list[Tensor], train_rankzero: list[Tensor]) -> float:
    """The largest relative difference of two curves, as far as both go."""
    a, b = (
        torch.stack(losses[: min(len(theirs), len(train_rankzero))]).double().cpu()
        for losses in (theirs, train_rankzero)
    )
    return ((b - a).abs() / a.abs()).max().item()
