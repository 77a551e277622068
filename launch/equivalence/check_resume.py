"""Kill a run, resume it, compare it with one that was not killed: `rankzero resume_check`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.cli.command import report_mistakes
from launch.cli.resolve import Settings, resolve
from launch.equivalence.kill_and_resume import ResumeChecker
from launch.equivalence.kill_plan import Extent
from launch.equivalence.resume_table import print_results
from launch.equivalence.run_arguments import args_for_strategy
from launch.equivalence.subprocesses import subprocess_environment
from launch.runtime.world import World

DEFAULT_STRATEGIES = ("single", "ddp", "fsdp", "zero3")
OVERRIDDEN_KEYS = ("strategy", "steps", "epochs", "checkpoint.every", "checkpoint.every_minutes", "log.every")
"""keys of a run that the check sets itself"""


def check_resume(extent: Extent, argv: Sequence[str], settings: Settings) -> int:
    """Kill, resume and compare the runs that `check_arguments` has checked; returns the exit code."""
    start, base = time.monotonic(), Path(settings.config.run_dir or "runs")
    existed = base.exists()
    with report_mistakes():
        directory = new_directory(base)
    try:
        checker = ResumeChecker(
            extent,
            argv,
            directory,
            subprocess_environment(max(extent.ranks)),
            settings.config.precision,
            settings.config.seed,
        )
        results = checker.check()
    except KeyboardInterrupt:
        print(f"\nrankzero: interrupted; the runs so far are kept in {directory}", file=sys.stderr)
        return 130
    print_results(results, settings.config.precision, time.monotonic() - start)
    if any(result.problems for result in results):
        print(f"the runs and their output are kept in {directory}")
        return 1
    shutil.rmtree(directory)
    if not existed:
        with suppress(OSError):  # something else has been put there meanwhile
            base.rmdir()
    return 0


def check_arguments(argv: Sequence[str], extent: Extent) -> tuple[Settings, list[str]]:
    """The run as one process, and the arguments of all runs: with micro-batches that fit every layout.

    All layouts are checked. Raises ValueError or FileNotFoundError for the user to read.
    """
    lengths = [
        f"steps={extent.steps}",
        f"checkpoint.every={extent.every}",
        "checkpoint.every_minutes=null",
        "log.every=1",
    ]
    argv = [f"eval.every={extent.steps}", *argv, *lengths]
    settings = resolve([*args_for_strategy(argv, "single"), "strategy=single"], World())
    if settings.config.debug or settings.config.resume != "auto":
        raise ValueError(
            "debug= and resume= have no meaning here: the check starts and resumes by itself; drop them"
        )
    # BatchNorm and dropout see micro-batches: with others, two numbers of ranks are two different runs
    micro = settings.config.given_micro_batch_size
    argv.append(f"micro_batch_size={micro or max(settings.config.batch_size // max(extent.ranks), 1)}")
    for strategy in extent.strategies:
        for ranks in [1] if strategy == "single" else extent.ranks:
            resolve([*args_for_strategy(argv, strategy), f"strategy={strategy}"], World(world_size=ranks))
    return settings, argv


def new_directory(base: Path) -> Path:
    """A new directory in `base`. Raises ValueError for the user to read."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="resume_check-", dir=base))
    except OSError as error:
        raise ValueError(
            f"run_dir={base}: no directory can be made there ({error.strerror}); name another"
        ) from None
