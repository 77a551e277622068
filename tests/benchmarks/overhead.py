"""What a step costs with rankzero and with its peers, over a loop written by hand: the whole step, loading
included.

    OMP_NUM_THREADS=1 python tests/benchmarks/overhead.py strategies=single rounds=3 steps=120

`pip install -e ".[peers]"` gives the peers. On CPU ranks: one process, or two under a strategy. Each
framework and the raw loop run in turns (A B B A) in the same processes, `rounds` times; the figure is the
median of paired ratios. A run is `steps` steps; each starts where the loss function is called, which takes
the time, for all alike. The first 20 steps do not count. An epoch is longer than a run, so what happens at
its end (checkpoints) is not measured. Same data, order, weights and optimizer; all take the gradient norm and
clip at a bound that is never reached.

`defaults`: what a user gets: logs, progress bars, callbacks, data workers, to a file instead of a terminal.
`bare`: all that can be left out is, on both sides. The losses of the first 20 steps must agree with the raw
loop's, else there is no figure. A framework that fails, or holds its model in another way than it was asked
to (DDP in place of FSDP), has none either, and the table says why.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from launch.cli.command import read_command
from tests.benchmarks.benchmark_report import Report, ratios
from tests.benchmarks.loops import FRAMEWORKS, installed
from tests.benchmarks.loops.paired_runs import LOSS_TOLERANCE, Comparison, compare
from tests.benchmarks.loops.workloads import WORKLOADS
from tests.launch.processes import free_port
from tests.ranks import RanksFailed, run_ranks, shut_down

COLUMNS = {
    **{"strategy": "<9", "workload": "<9", "mode": "<9", "framework": "<11"},
    **{"raw_ms": ">9.3f", "ratio": ">9.3f", "low": ">9.3f", "high": ">9.3f", "losses": ">9.0e", "note": ""},
}


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    rounds: int = 10
    """A B B A of each comparison"""
    steps: int = 200
    """steps of a run"""
    strategies: list[str] = field(default_factory=lambda: ["single", "ddp", "fsdp", "zero2", "zero3"])
    """strategies to compare under, separated by commas"""
    workloads: list[str] = field(default_factory=lambda: list(WORKLOADS))
    """models to train"""
    modes: list[str] = field(default_factory=lambda: ["bare", "defaults"])
    """bare: all that is optional is off; defaults: what a user gets"""
    frameworks: list[str] = field(default_factory=lambda: list(FRAMEWORKS))
    """those to compare with the raw loop"""
    keep: str | None = None
    """folder for what the frameworks print (default: a temporary one)"""
    json: str | None = None
    """file for the rows as JSON, with machine and versions"""


def main(argv: list[str]) -> None:
    """Print the table; `low` and `high` are the quartiles of the ratio, `losses` their largest difference."""
    options = read_command(argv, __doc__, Options, name="overhead.py").options
    report = Report(options.json, COLUMNS)
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for strategy, name in product(options.strategies, options.frameworks):
            if installed(name):
                compare_under(options, strategy, name, folder, report)
                shut_down()  # the next pair gets new processes
            else:
                report.row(strategy=strategy, framework=name, note="left out: not installed")


def compare_under(options: Options, strategy: str, name: str, folder: str, report: Report) -> None:
    """The rows of one framework under one strategy."""
    port = free_port()
    for workload, mode in product(options.workloads, options.modes):
        comparison = Comparison(
            name=name,
            strategy=strategy,
            workload=workload,
            bare=mode == "bare",
            rounds=options.rounds,
            steps=options.steps,
            port=port,
            folder=folder,
        )
        figures = measure(comparison)
        report.row(strategy=strategy, workload=workload, mode=mode, framework=name, **figures)
        if "ratio" not in figures and "losses" not in figures:
            break  # it would not do better on the next workload


def measure(comparison: Comparison) -> dict[str, Any]:
    """The rest of the row."""
    try:
        pairs, loss_difference, sharding = run_ranks(
            1 if comparison.strategy == "single" else 2, compare, comparison, timeout=3600.0
        )[0]
    except RanksFailed as failed:
        return {"note": f"left out: {next(iter(failed.errors.values())).strip().splitlines()[-1]}"[:150]}
    expected = "whole" if comparison.strategy in ("single", "ddp") else comparison.strategy
    if sharding != expected:
        return {"note": f"left out: was asked for {comparison.strategy}, holds the model {sharding}"}
    # both ranks on the same data, say: Accelerate and its Trainer take themselves for alone under DeepSpeed
    # on a CPU
    found = {"raw_ms": statistics.median(raw for raw, _ in pairs) * 1e3, "losses": loss_difference}
    return {**found, **(ratios(pairs) if loss_difference <= LOSS_TOLERANCE else {"ratio": "differs"})}


if __name__ == "__main__":
    main(sys.argv[1:])
