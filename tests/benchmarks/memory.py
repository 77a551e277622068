"""The most memory that a rank takes, against a script written by hand, under each strategy.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py rounds=3 strategies=single,ddp

A multilayer perceptron of 100 MB of parameters with Adam; one process, or two ranks under a strategy. On a
CPU the high-water mark of the resident memory of each rank, of which the largest counts, on a GPU what torch
has allocated at most. Both import the same modules, and `base` is a process that does nothing else.
`training`: the real loop and record, but no checkpoint. `run`: all of a run, whose checkpoint is copied to
host memory and written behind the training, and its test and export; by hand,
`torch.save` (or the engine's own) at the end.

On both sides a tensor of a megabyte or more has pages of its own (`MALLOC_MMAP_THRESHOLD_`). In glibc's heap,
freed ones leave holes into which the next do not fit: under FSDP2 that trebles what a rank takes beyond its
imports, by chance and growing with the steps, in the same way for a script by hand.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch.cli.command import read_command
from tests.benchmarks.benchmark_report import Report, interleave, ratios
from tests.launch.processes import free_port

if TYPE_CHECKING:
    from recipes.base import Recipe

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    **{"strategy": "<10", "what": "<10", "base_mb": ">9.1f", "raw_mb": ">11.1f", "rankzero_mb": ">12.1f"},
    **{"ratio": ">8.3f", "low": ">8.3f", "high": ">8.3f", "aim": ">9"},
}
BATCH = 32


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    rounds: int = 3
    """A B B A of each comparison"""
    steps: int = 4
    """steps of a run"""
    strategies: list[str] = field(default_factory=lambda: ["single", "ddp", "fsdp", "zero2", "zero3"])
    """strategies to compare under, separated by commas"""
    layers: int = 6
    """linear layers of the model"""
    width: int = 2048
    """width of a layer"""
    side: Literal["", "base", "raw", "raw_saved", "training", "run"] = ""
    """what one rank does and reports: the benchmark sets it for the processes that it starts"""
    folder: str = ""
    """where that rank writes: set by the benchmark too"""
    json: str | None = None
    """file for the rows as JSON, with machine and versions"""


def main(argv: list[str]) -> None:
    """Print the table; the ratio is of all memory, base included. One rank prints its peak."""
    options = read_command(argv, __doc__, Options, name="memory.py").options
    if options.side:
        print(peak_of_rank(options), flush=True)
        os._exit(0)
    report = Report(options.json, COLUMNS)
    for strategy in options.strategies:
        base = peak(options, strategy, "base")
        for what, theirs, ours in (("training", "raw", "training"), ("run", "raw_saved", "run")):
            pairs = interleave(
                partial(peak, options, strategy, theirs),
                partial(peak, options, strategy, ours),
                options.rounds,
            )
            raw, rankzero = (statistics.median(column) / 1e6 for column in zip(*pairs, strict=True))
            sizes = {"base_mb": base / 1e6, "raw_mb": raw, "rankzero_mb": rankzero}
            aim = "<= 1.01" if what == "training" else None
            report.row(strategy=strategy, what=what, **sizes, **ratios(pairs), aim=aim)


def peak(options: Options, strategy: str, side: str) -> int:
    """Bytes of the rank that takes most."""
    ranks = 1 if strategy == "single" else 2
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    sizes = [f"{name}={getattr(options, name)}" for name in ("steps", "layers", "width")]
    with tempfile.TemporaryDirectory() as folder:
        args = [f"side={side}", f"folder={folder}", f"strategies={strategy}", *sizes]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *args],
                cwd=ROOT,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{' '.join(args)}\n" + "\n".join(out + err for out, err in outputs))
    return max(int(out.split()[-1]) for out, _ in outputs)


# one rank ---------------------------------------------------------------------------------------------------


def peak_of_rank(options: Options) -> int:
    """Train as `side` says; returns this rank's peak in bytes."""
    import torch

    import launch.training.trainer  # noqa: F401
    from tests.benchmarks import raw_loop
    from tests.benchmarks.dense_run import Dense
    from tests.benchmarks.loops import raw_strategies  # noqa: F401  # what FSDP2 needs

    (strategy,), side, folder = options.strategies, options.side, Path(options.folder)
    if strategy.startswith("zero"):
        from strategies.deepspeed_compat import import_deepspeed

        import_deepspeed()
    recipe = Dense(width=options.width, layers=options.layers, samples=BATCH, adam=True)
    if side.startswith("raw"):
        raw_loop.train(recipe, strategy, BATCH, options.steps, folder if side == "raw_saved" else None)
    elif side != "base":
        train_rankzero(recipe, options, folder / "run", save=side == "run")
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_rankzero(recipe: Recipe, options: Options, run_dir: Path, save: bool) -> None:
    """As `launch.training.trainer` does it."""
    from launch.checkpoint.writer import CheckpointWriter
    from launch.cli.config import Config
    from launch.cli.resolve import Settings
    from launch.reporting.console import Console
    from launch.reporting.metrics import Metrics
    from launch.runtime.rendezvous import process_group
    from launch.runtime.world import find_world
    from launch.state.build import prepare
    from launch.training import trainer
    from launch.training.loop import train
    from launch.training.stop_and_save import Requests

    world = find_world(os.environ)
    micro = BATCH // world.world_size
    config = Config(recipe="dense", batch_size=BATCH, micro_batch_size=micro, steps=options.steps)
    config.strategy = options.strategies[0]  # type: ignore[assignment]  # one of them
    settings = Settings(config, recipe)
    if save:
        trainer.run(settings, world, run_dir)
        return
    with process_group(world, config.strategy) as world:
        run = prepare(settings, world)
        run_dir.mkdir(exist_ok=True)
        metrics = Metrics(run, run_dir, Console(False))
        checkpoints = CheckpointWriter(run, run_dir, {})
        checkpoints.reserve = checkpoints.save = lambda: None  # type: ignore[method-assign]
        train(run, metrics, checkpoints, Requests(metrics, checkpoints))


if __name__ == "__main__":
    main(sys.argv[1:])
