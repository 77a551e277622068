"""What one GPU makes of GPT-2 124M, ResNet-50 and ViT-S, and what rankzero costs there. For an H100 or H200,
in ten minutes.

    python tests/benchmarks/gpu.py json=gpu.json

`limits`: matrix products and copies on this very card, sustained. `gpt` (sequence 1,024), `resnet` (224
pixels) and `vit`: each row is the raw loop of `loops/raw_strategies.py` with one optimization more than the
row above. `gain` is over that row, and `losses` how far the first ones are from its own, relative; too far,
and there is no figure. `mfu` is the share of what the data sheet promises, `of_product` of the matrix product
measured in the same precision: of the model's own operations, forward and backward, attention in full, as
torch's FlopCounterMode counts them. Compiled are blocks and loss one by one, which is what rankzero does, and
ResNet-50 as a whole.

`loop`: the raw loop (`raw_ms`) and rankzero (`ms`: `launch.training.loop.train` with its record) at the
fastest variant, one rank, A B B A `rounds` times; the ratio is the median over pairs, its quartiles beside
it, and there is none unless losses agree. Both read loss and norm once in ten steps, and clip at a bound that
is never reached. Each sets what torch has for all of a process as it would by itself: cuDNN's benchmark is on
for the raw loop, and off for rankzero. `checkpoint`: what the training waits for a save of GPT-2 and its
optimizer (`ms`), against a plain copy of as much into pinned host memory (`raw_ms`). `mnist=FOLDER` holds the
four files of MNIST, as `data.root` does.

The data are random and lie on the GPU. A row warms up for 5 steps, makes 3 to learn the pace, and is then
measured for `seconds`, the device being waited for at both ends only. A batch that does not fit into memory
is halved. The budget of an H100, not yet tried: 34 trainings of 6 s with warm-up and start, 60 s for first
weights, 3 minutes of compilation, 80 s for all else; a row that would begin after `minutes` is left out, and
says so. Without a GPU all rows stay empty. `rehearse=true` runs the code of each row on the CPU, at toy sizes
and with torch.compile's `eager` backend: losses are compared, nothing is timed. Exit code 1 if a row failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "rehearse=true" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from launch.cli.command import read_command
from tests.benchmarks.benchmark_report import Report
from tests.benchmarks.gpu_rows import (
    FAILED,
    LEFT_OUT,
    WITHOUT_FIGURE,
    WRONG,
    GpuSettings,
    Measurement,
    checkpoint_stall,
    hardware_limits,
    loop_overhead,
    optimizations,
    time_to_accuracy,
)
from tests.benchmarks.gpu_rows.timing import free_gpu_memory

SECTIONS: dict[str, Callable[[GpuSettings], Iterator[Measurement]]] = {
    "limits": hardware_limits.rows,
    **{kind: partial(optimizations.rows, kind=kind) for kind in optimizations.OPTIMIZATIONS},
    "loop": loop_overhead.rows,
    "checkpoint": checkpoint_stall.rows,
    "mnist": time_to_accuracy.rows,
}
COLUMNS = {
    **{
        "section": "<10",
        "row": "<35",
        "batch": ">6d",
        "ms": ">9.2f",
        "raw_ms": ">9.2f",
        "rate": ">11,.1f",
        "unit": "<9",
    },
    **{
        "gain": ">6.2f",
        "mfu": ">6.3f",
        "of_product": ">10.3f",
        "memory_gb": ">9.2f",
        "ratio": ">7.4f",
        "low": ">7.4f",
    },
    **{"high": ">7.4f", "losses": ">8.0e", "aim": "<10", "note": ""},
}


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    rows: list[str] = field(default_factory=lambda: list(SECTIONS))
    """sections of the table, separated by commas"""
    seconds: float = 3.0
    """length of a measured window"""
    rounds: int = 1
    """A B B A of each comparison"""
    minutes: float = 10.0
    """after which no row is begun"""
    mnist: str | None = None
    """folder that holds the four files of MNIST"""
    rehearse: bool = False
    """run the code of each row on the CPU, at toy sizes, and time nothing"""
    json: str | None = None
    """file for the rows as JSON, with machine and versions"""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    options = read_command(argv, __doc__, Options, name="gpu.py").options
    there, rehearse = torch.cuda.is_available(), options.rehearse
    end = time.monotonic() + 60 * options.minutes
    settings = GpuSettings(
        device="cuda:0" if there else "cpu",
        rehearse=rehearse,
        seconds=0.0 if rehearse else options.seconds,
        rounds=options.rounds,
        mnist=options.mnist,
    )
    if rehearse:
        # inductor would take minutes; and rankzero itself lets no other be chosen
        torch.compile = partial(torch.compile, backend="eager")
    gpu = described(settings.device) if there else "no GPU"
    print(gpu)
    report = Report(options.json, COLUMNS)
    report.facts["gpu"] = gpu
    notes = []
    for row in chain.from_iterable(SECTIONS[name](settings) for name in options.rows):
        found: dict[str, Any] = {"note": "no GPU"}
        if time.monotonic() > end:
            found = {"note": f"{LEFT_OUT}: {options.minutes:g} minutes are over"}
        elif there or rehearse:
            free_gpu_memory(settings.device)
            found = measured(row, rehearse)
        notes.append(found.get("note", ""))
        report.row(section=row.section, row=row.name, aim=row.aim, **found)
    return int(any(note.startswith((FAILED, WRONG)) for note in notes))


def measured(row: Measurement, rehearse: bool) -> dict[str, Any]:
    """The rest of the row. One that fails says so, and the next is measured all the same."""
    try:
        found = row.measure()
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        found = {"note": f"{FAILED}: {type(error).__name__}: {first}"[:150]}
    if rehearse:
        note = found.get("note", "")
        found = {
            "losses": found.get("losses"),
            "note": note if note.startswith(WITHOUT_FIGURE) else "rehearsal",
        }
    return found


def described(device: str) -> str:
    """The card, as the driver knows it."""
    found = torch.cuda.get_device_properties(device)
    words = [found.name, f"{found.total_memory / 1e9:.1f} GB", f"CUDA {torch.version.cuda}"]
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm",
            "--format=csv,noheader",
        ]
        words += subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    return ", ".join(words)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of libraries (NCCL's, DeepSpeed's) may make a clean exit take seconds
