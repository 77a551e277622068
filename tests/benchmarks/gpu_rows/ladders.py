"""Ladders: the raw loop, faster rung by rung, each with one thing more than the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from launch.reporting.throughput import Throughput, peak_flops, peak_memory
from launch.state.run import Run
from recipes.base import local_num_items
from recipes.parts.data import Batch
from strategies.precision import set_matmul_precision
from tests.benchmarks.gpu_rows import WRONG, Bench, Row
from tests.benchmarks.gpu_rows.ceilings import product
from tests.benchmarks.gpu_rows.models import GPT2, TILE, ResNet50, Rung, ViTS
from tests.benchmarks.gpu_rows.timing import release
from tests.benchmarks.loops import Setting, raw

KINDS: dict[str, type[Rung]] = {"gpt": GPT2, "resnet": ResNet50, "vit": ViTS}
LADDERS: dict[str, dict[str, dict[str, Any]]] = {
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
"""what each rung adds; batches that fit into 80 GB, as public code for such cards has them"""
AIMS = {"gpt": ">= 400,000", "resnet": ">= 3,700"}
"""of the highest rung, on an H100"""
TOYS: dict[str, dict[str, Any]] = {
    "gpt": {"batch": 8, "samples": 64, "vocabulary": 255, "block": 32, "width": 64, "heads": 2, "layers": 2},
    "resnet": {"batch": 8, "samples": 64, "pixels": 16, "classes": 10, "toy": True},
    "vit": {"batch": 8, "samples": 64, "pixels": 32, "classes": 10, "toy": True},
}
SAME = {"gpt": 2e-3, "resnet": 3e-2, "vit": 2e-3}
"""relative: what losses may differ by, in bf16 or against fp32; fifty BatchNorms blow rounding up"""
CHECKED = 3
"""steps whose losses are compared"""
NEVER = 10**9

Found = TypeVar("Found")


def rungs(bench: Bench, kind: str) -> Iterator[tuple[str, Rung]]:
    """The rungs of a ladder by name, in a rehearsal as toys."""
    total: dict[str, Any] = {"device": bench.device, "seconds": bench.seconds}
    for name, added in LADDERS[kind].items():
        total |= added
        yield name, KINDS[kind](**{**total, **(TOYS[kind] if bench.rehearse else {})})


def top(bench: Bench, kind: str) -> Rung:
    """The highest rung."""
    *_, (_, last) = rungs(bench, kind)
    return last


def rows(bench: Bench, kind: str) -> Iterator[Row]:
    """A row a rung."""
    before: list[tuple[Rung, float]] = []
    for name, rung in rungs(bench, kind):
        aim = AIMS.get(kind) if rung == top(bench, kind) else None
        yield Row(section=kind, name=name, measure=partial(climb, bench, kind, rung, before), aim=aim)


def climb(bench: Bench, kind: str, rung: Rung, before: list[tuple[Rung, float]]) -> dict[str, Any]:
    """The speed of a rung, what it gains over the one `before` it, whose place it takes, and how far their
    losses are apart.
    """
    rung = fitting(replace(rung, tiled=CHECKED), trained)
    found = {**speed(bench, kind, rung, rung.paces[0]), "memory_gb": rung.peak / 1e9}
    lower, rate = before.pop() if before else (rung, found["rate"])
    before.append((rung, found["rate"]))
    if lower is rung:
        return found
    losses = apart(*(notes.first_losses[: notes.tiled] for notes in (lower, rung)))
    if not losses <= SAME[kind]:  # nor if one is not a number
        return {"losses": losses, "note": f"{WRONG}: {losses:.0e} from the losses of the rung before"}
    return {**found, "gain": found["rate"] / rate, "losses": losses}


def trained(rung: Rung, strategy: str = "single") -> Rung:
    """The rung, once the raw loop has trained it."""
    rung = replace(rung)
    release(rung.device)
    set_matmul_precision(rung.precision)
    torch.backends.cudnn.benchmark = True  # as one does for convolutions of one size
    raw.run(rung, NEVER, Setting(strategy=strategy, bare=False, rank=0, ranks=1, folder=Path()))
    rung.peak = peak_memory(rung.device)
    return rung


def fitting(rung: Rung, run: Callable[[Rung], Found]) -> Found:
    """What `run` makes of the rung; of half of its batch if that does not fit into memory, and so on."""
    while True:
        # else torch would take a batch of another size for one that varies, and compile slower code for any
        # size
        torch.compiler.reset()
        try:
            return run(rung)
        except torch.OutOfMemoryError:
            if rung.batch // 2 < TILE:
                raise
        # only here, where nothing holds the frames of the failure any more, can their memory be used again
        rung = replace(rung, batch=rung.batch // 2)


def speed(bench: Bench, kind: str, rung: Rung, seconds: float) -> dict[str, Any]:
    """Of a step of so many seconds: units a second, and the share of what the card can, by its data sheet and
    as measured.
    """
    flops = flops_of_sample(bench, kind) * rung.batch / seconds
    peak = peak_flops(bench.device, rung.precision)
    return {
        "batch": rung.batch,
        "ms": seconds * 1e3,
        "rate": local_num_items(rung, one_sample(rung)) * rung.batch / seconds,
        "unit": f"{rung.item_name}/s",
        "flops": flops,
        "mfu": flops / peak if peak else None,
        "of_product": flops / product(bench, rung.precision),
    }


@cache
def flops_of_sample(bench: Bench, kind: str) -> float:
    """Of forward and backward, by the lowest rung: padding is no work done, nor is what a rung computes
    twice.
    """
    _, rung = next(rungs(bench, kind))
    counted = Throughput(cast(Run, SimpleNamespace(recipe=rung)))
    counted.first = one_sample(rung)
    found = counted.flops()
    assert found is not None
    return found


def one_sample(rung: Rung) -> Batch:
    """A batch of one, without its data."""
    return [tensor.to("meta") for tensor in replace(rung, samples=1).rows()]


def apart(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest relative difference of two curves, as far as both go."""
    a, b = (torch.stack(losses[: min(len(theirs), len(ours))]).double().cpu() for losses in (theirs, ours))
    return ((b - a).abs() / a.abs()).max().item()
