"""Prove on your own recipe and storage that a killed run resumes as if nothing had happened.

    rankzero resume_check recipe=gpt
    rankzero resume_check recipe=./mine.py run_dir=/scratch/me ranks=2,4
    rankzero resume_check recipe=./mine.py strategies=ddp,fsdp all=true

Starts the real command (launch/run.py) again and again, shortened to `compare` steps. For each of
`strategies`: a run without interruption; the same run, ended by `kill -9` in its second half, at a random
moment or in the middle of a save; then the same command once more, which resumes. Losses, gradient norms,
learning rates and evaluation metrics of all steps must be equal bit by bit, and so must the final weights.
Then the checkpoint that the killed run left is loaded by the next strategy on another number of ranks: losses
and gradient norms must stay within the tolerance of the precision (fp32: 1e-5).

Proved is what was run: this recipe, these steps, this storage, processes on this machine. Not proved: that
the storage keeps what it has confirmed through a loss of power or on another node, nor that a longer run has
no state that the first steps lack.

The check sets steps, epochs, resume, debug, checkpoint.every and log.every itself. Its runs lie in a new
directory in run_dir (default: runs), removed if all passed.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from launch.cli.command import Arguments, read_command, report_mistakes
from launch.equivalence.check_resume import DEFAULT_STRATEGIES, OVERRIDDEN_KEYS, check_arguments, check_resume
from launch.equivalence.kill_plan import Extent
from launch.equivalence.run_arguments import choose_strategies, drop_keys
from launch.runtime.exit_codes import ExitCode
from strategies import STRATEGIES

EXITS = {ExitCode.DONE: "all passed", ExitCode.FAILED: "a row failed", ExitCode.INTERRUPTED: "interrupted"}


@dataclass(kw_only=True)
class ResumeCheckOptions:
    """What `rankzero resume_check` takes besides the keys of a run."""

    ranks: list[Annotated[int, Ge(2)]] = field(default_factory=lambda: [2])
    """numbers of processes, separated by commas: the first is that of the killed runs, the others only read
    (single: always one)
    """
    strategies: list[str] = field(default_factory=lambda: list(DEFAULT_STRATEGIES))
    """those to kill and to read with, separated by commas"""
    compare: Annotated[int, Ge(4)] = 20
    """steps of each run"""
    all: bool = False
    """every pair of strategies and numbers of ranks, and both kinds of kill for each"""


def main(argv: list[str]) -> int:
    """Check; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    arguments = read_command(
        argv, __doc__, ResumeCheckOptions, name="resume_check", takes_run=True, exits=EXITS
    )
    with report_mistakes():
        extent, run_argv = extent_of(arguments)
        settings, run_argv = check_arguments(run_argv, extent)
    return check_resume(extent, run_argv, settings)


def extent_of(arguments: Arguments[ResumeCheckOptions]) -> tuple[Extent, list[str]]:
    """How much to check, and the arguments of the run without those the check sets. Raises ValueError."""
    options = arguments.options
    strategies = choose_strategies(options.strategies, list(STRATEGIES), DEFAULT_STRATEGIES)
    extent = Extent(options.ranks, strategies, options.compare, options.all)
    return extent, drop_keys(arguments.run_argv, OVERRIDDEN_KEYS)
