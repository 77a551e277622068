"""Prove on your own recipe and storage that a killed run goes on as if nothing had happened.

    python launch/commands/resume_check.py recipe=gpt
    python launch/commands/resume_check.py recipe=./mine.py run_dir=/scratch/me ranks=2,4 strategies=ddp,fsdp compare=40 all=true

Starts the real command (launch/run.py) again and again, shortened to compare=20 steps. For each of
strategies=single,ddp,fsdp,zero3, on ranks=2 processes (single: one): a run without interruption; the same
run, ended by `kill -9` behind its first half, at a random moment or in the middle of a save; then the same
command once more, which resumes. Losses, gradient norms, learning rates and scores of all steps must be equal
bit by bit, and so must the final weights. Then the checkpoint that the killed run left is read by the next
strategy on another number of ranks: losses and gradient norms must stay within the tolerance of the precision
(fp32: 1e-5). all=true takes every pair of strategies and numbers of ranks, and both kinds of kill for each;
ranks=2,4 also reads on 4.

Proved is what was run: this recipe, these steps, this storage, processes on this machine. Not proved: that
the storage keeps what it has confirmed through a loss of power or on another node, nor that a longer run
meets no state that the first steps lack.

All keys of a run work here too, but for steps, epochs, resume, debug, checkpoint.every and log.every, which
are the check's own. Its runs lie in a new folder in run_dir (default: runs), removed if all passed. Exit
codes: 0 all passed; 1 a row failed; 2 a mistake in the command.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.cli import help
from launch.cli.config import exit_with_mistake, read_line
from launch.cli.resolve import Settings, resolve
from launch.equivalence.common import choose_strategies, environment, for_strategy, whole_number, without
from launch.equivalence.kill_and_resume import ResumeChecker
from launch.equivalence.kill_plan import Extent
from launch.equivalence.resume_table import print_results
from launch.runtime.world import World
from strategies import STRATEGIES

DEFAULT = ("single", "ddp", "fsdp", "zero3")
OWN_KEYS = ("ranks", "strategies", "compare", "all")
REPLACED = ("strategy", "steps", "epochs", "checkpoint.every", "checkpoint.every_minutes", "log.every")
"""keys of a run that the check sets itself"""


def main(words: list[str]) -> int:
    """Check; returns the exit code."""
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return 0
        own, words = own_keys(words)
        settings, words = agree(words, own)
        base = Path(settings.config.run_dir or "runs")
        existed = base.exists()
        folder = new_folder(base)
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, 0)
    start = time.monotonic()
    try:
        checker = ResumeChecker(
            own, words, folder, environment(max(own.ranks)), settings.config.precision, settings.config.seed
        )
        results = checker.check()
    except KeyboardInterrupt:
        print(f"\nrankzero: interrupted; the runs so far are kept in {folder}", file=sys.stderr)
        return 130
    print_results(results, settings.config.precision, time.monotonic() - start)
    if any(result.problems for result in results):
        print(f"the runs and their output are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    if not existed:
        with suppress(OSError):  # something else has been put there meanwhile
            base.rmdir()
    return 0


# what to do -------------------------------------------------------------------------------------------------


def own_keys(words: Sequence[str]) -> tuple[Extent, list[str]]:
    """This command's own keys, and the other words. Raises ValueError for what they cannot be."""
    line = read_line(words)
    ranks = [whole_number("ranks", text, "processes", 2) for text in line.get("ranks", "2").split(",")]
    steps = whole_number("compare", line.get("compare", "20"), "steps", 4)
    if (everything := line.get("all", "false")) not in ("true", "false"):
        raise ValueError(f"all={everything} is not true or false")
    strategies = choose_strategies(line, list(STRATEGIES), DEFAULT)
    own = Extent(ranks, strategies, steps, everything == "true")
    return own, without(words, (*OWN_KEYS, *REPLACED))


def agree(argv: Sequence[str], extent: Extent) -> tuple[Settings, list[str]]:
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
    settings = resolve([*for_strategy(argv, "single"), "strategy=single"], World())
    if settings.config.debug or settings.config.resume != "auto":
        raise ValueError(
            "debug= and resume= have no meaning here: the check starts and resumes by itself; drop them"
        )
    # BatchNorm and dropout see micro-batches: with others, two numbers of ranks are two different runs
    micro = settings.config.given_micro_batch_size
    argv.append(f"micro_batch_size={micro or max(settings.config.batch_size // max(extent.ranks), 1)}")
    for strategy in extent.strategies:
        for ranks in [1] if strategy == "single" else extent.ranks:
            resolve([*for_strategy(argv, strategy), f"strategy={strategy}"], World(world_size=ranks))
    return settings, argv


def new_folder(base: Path) -> Path:
    """A folder of our own in `base`. Raises ValueError for the user to read."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="resume_check-", dir=base))
    except OSError as error:
        raise ValueError(
            f"run_dir={base}: no folder can be made there ({error.strerror}); name another"
        ) from None
