"""What a checkpoint costs: the wait of the training, its slow-down, processor time, memory, the disk, a large
manifest.

    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoint.py folder=/where/to/write state_mb=200

One process, a state of `state_mb` (weights and two moments of Adam). Times that are compared are taken in
turns and given as the median of paired ratios. `folder` says which disk is meant (default: that of temporary
files).
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.filesize import decimal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.checkpoint.saved_state import slices_of
from launch.cli.command import read_command
from tests.benchmarks import checkpoint_storage as storage
from tests.benchmarks.checkpoint_run import dense, ratio, say, steps, timed
from tests.benchmarks.dense_run import prepared

EVERY = 20
"""steps between the checkpoints of the slow-down"""

# the wait ---------------------------------------------------------------------------------------------------


def blocking_s(state_mb: float, rounds: int = 15) -> None:
    """Background save, memcpy, synchronous save, and what one would write by hand."""
    with prepared(dense(state_mb), every=10**9) as (run, parts):
        going = steps(run, parts)
        next(going), next(going)
        parts.checkpoints.reserve()
        size = sum(part.values.nbytes for part in slices_of(run).values())
        source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
        raw_file = parts.metrics.run_dir / "raw.pt"

        def save_and_wait() -> None:
            parts.checkpoints.save()
            parts.checkpoints.wait()

        def torch_save() -> None:
            model, optimizer = run.models["model"], run.strategies["model"].optimizer
            with raw_file.open("wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

        background, copy, synchronous, hand, writes, processor = [], [], [], [], [], []
        for _ in range(rounds):
            next(going)
            copy.append(timed(lambda: target.copy_(source)))
            background.append(timed(parts.checkpoints.save))
            before = cpu_seconds()
            saved = parts.checkpoints.wait()
            processor.append(cpu_seconds() - before)
            assert saved is not None
            writes.append(saved.write_s)
            next(going)
            synchronous.append(timed(save_and_wait))
            hand.append(timed(torch_save))
    say(f"stall of a background save, {decimal(size)}", f"{statistics.median(background) * 1e3:.1f} ms")
    say("  against a memcpy of as much", ratio(background, copy), "at most 1.2")
    say("  a synchronous save against it", ratio(synchronous, background), "at least 10")
    say("  torch.save and fsync against it", ratio(hand, background))
    say("written behind the training", f"{size / statistics.median(writes) / 1e9:.2f} GB/s")
    say("processor seconds behind the training", f"{statistics.median(processor) / size * 1e9:.2f} s/GB")


def cpu_seconds() -> float:
    """Processor time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# the slow-down ----------------------------------------------------------------------------------------------


def make_steps(steps: Iterator[None]) -> None:
    """As many as there are between two checkpoints."""
    for _ in range(EVERY):
        next(steps)


def slow_down(state_mb: float, burner: bool, rounds: int = 4) -> None:
    """A run with a checkpoint every 20 steps, and one without; with `burner` the other cores are busy too."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range((os.cpu_count() or 1) - 1)
        if burner
    ]
    recipe = dense(state_mb)
    recipe.samples = 64
    try:
        with (
            prepared(recipe, every=EVERY) as (run, parts),
            prepared(recipe, every=10**9) as (plain_run, plain_parts),
        ):
            with_saves, without = steps(run, parts), steps(plain_run, plain_parts)
            pairs: list[tuple[float, float]] = []

            def saving() -> None:
                """A save goes on behind what follows it: the wait for it belongs to the run that saves."""
                make_steps(with_saves)
                parts.checkpoints.wait()

            not_saving = partial(make_steps, without)
            make_steps(with_saves)
            not_saving()
            for _ in range(rounds):
                a, b, c, d = (timed(work) for work in (not_saving, saving, saving, not_saving))
                pairs += [(b, a), (c, d)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    step = statistics.median(a for _, a in pairs) / EVERY
    extra = statistics.median(b / a - 1 for b, a in pairs)
    where = "all cores busy" if burner else "a core to spare"
    say(
        f"a checkpoint every {EVERY} steps of {step * 1e3:.0f} ms, {where}",
        f"{extra:+.1%}",
        "" if burner else "at most +3.5 %",
    )


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    folder: str | None = None
    """where to write: this says which disk is measured (default: that of temporary files)"""
    state_mb: float = 200.0
    """size of weights and optimizer state"""
    export_mb: float = 2000.0
    """size of the weights that are exported"""
    peak_of: float | None = None
    """the megabytes of a state whose peak of memory is printed: set by the benchmark itself"""


def main(argv: list[str]) -> None:
    """Print the table."""
    options = read_command(argv, __doc__, Options, name="checkpoint.py").options
    if options.peak_of is not None:
        print(storage.peak(options.peak_of))
        return
    tempfile.tempdir = options.folder or tempfile.gettempdir()
    free = decimal(shutil.disk_usage(tempfile.tempdir).free)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {free} free"
    )
    print(f"load before the start: {os.getloadavg()[0]:.1f}\n")
    blocking_s(options.state_mb)
    slow_down(options.state_mb, burner=False)
    slow_down(options.state_mb, burner=True)
    storage.memory(options.state_mb, Path(__file__))
    storage.disk(options.state_mb)
    storage.manifest()
    storage.export(options.export_mb)


if __name__ == "__main__":
    main(sys.argv[1:])
