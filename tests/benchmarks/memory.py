"""The most memory that a rank takes, against a script written by hand, under each strategy.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py [rounds=3] [steps=4] [strategies=single,ddp,fsdp,zero2,zero3]
        [layers=6] [width=2048] [json=PATH]

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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch.cli.keys import read_argv
from tests.benchmarks.benchmark_report import Report, interleave, ratios
from tests.launch.processes import free_port

if TYPE_CHECKING:
    from recipes.base import Recipe

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    **{"strategy": "<10", "what": "<10", "base_mb": ">9.1f", "by_hand_mb": ">11.1f", "rankzero_mb": ">12.1f"},
    **{"ratio": ">8.3f", "low": ">8.3f", "high": ">8.3f", "aim": ">9"},
}
BATCH = 32


def main(words: list[str]) -> None:
    """The table; the ratio is of the whole, base included."""
    given = {
        "rounds": "3",
        "steps": "4",
        "strategies": "single,ddp,fsdp,zero2,zero3",
        "layers": "6",
        "width": "2048",
    }
    line = {**given, **read_argv(words)}
    report = Report(line.get("json"), COLUMNS)
    for strategy in line["strategies"].split(","):
        said = [f"{name}={line[name]}" for name in ("steps", "layers", "width")] + [f"strategy={strategy}"]
        base = peak("base", said)
        for what, theirs, ours in (("training", "by_hand", "training"), ("run", "by_hand_saved", "run")):
            pairs = interleave(partial(peak, theirs, said), partial(peak, ours, said), int(line["rounds"]))
            by_hand, rankzero = (statistics.median(column) / 1e6 for column in zip(*pairs, strict=True))
            sizes = {"base_mb": base / 1e6, "by_hand_mb": by_hand, "rankzero_mb": rankzero}
            report.row(
                strategy=strategy,
                what=what,
                **sizes,
                **ratios(pairs),
                aim="<= 1.01" if what == "training" else None,
            )


def peak(side: str, said: list[str]) -> int:
    """Bytes of the rank that takes most."""
    ranks = 1 if "strategy=single" in said else 2
    place = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"side={side}", f"folder={folder}", *said]
        processes = []
        for number in range(ranks):
            environment = {**os.environ, **place, "RANK": str(number), "LOCAL_RANK": str(number)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        outputs = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{side} {' '.join(said)}\n" + "\n".join(out + err for out, err in outputs))
    return max(int(out.split()[-1]) for out, _ in outputs)


# one rank ---------------------------------------------------------------------------------------------------


def rank(side: str, folder: Path, said: dict[str, str]) -> int:
    """Train one way or the other; returns this rank's peak in bytes."""
    import torch

    import launch.training.trainer  # noqa: F401
    from tests.benchmarks import raw_loop
    from tests.benchmarks.dense_run import Dense
    from tests.benchmarks.loops import raw_strategies  # noqa: F401  # what FSDP2 needs

    strategy = said["strategy"]
    if strategy.startswith("zero"):
        from strategies.deepspeed_compat import import_deepspeed

        import_deepspeed()
    recipe = Dense(width=int(said["width"]), layers=int(said["layers"]), samples=BATCH, adam=True)
    if side.startswith("by_hand"):
        raw_loop.train(
            recipe, strategy, BATCH, int(said["steps"]), folder if side == "by_hand_saved" else None
        )
    elif side != "base":
        ours(recipe, said, folder / "run", save=side == "run")
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(recipe: Recipe, said: dict[str, str], run_dir: Path, save: bool) -> None:
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
    from launch.training.requests import Requests

    world = find_world(os.environ)
    micro = BATCH // world.world_size
    config = Config(recipe="dense", batch_size=BATCH, micro_batch_size=micro, steps=int(said["steps"]))
    config.strategy = said["strategy"]  # type: ignore[assignment]  # one of them
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
    words = read_argv(sys.argv[1:])
    if "side" in words:
        print(rank(words["side"], Path(words["folder"]), words), flush=True)
        os._exit(0)
    main(sys.argv[1:])
