"""Prove on your own recipe that the strategies agree.

    rankzero parity recipe=gpt
    rankzero parity recipe=./mine.py precision=bf16 ranks=4 strategies=ddp,fsdp

Makes the first steps of the run as a single process, then under each strategy on several processes that it
starts itself, with gradient accumulation over 1 and 4 micro-batches, with clipping and with activation
checkpointing, on the same global batches; prints how far losses, gradient norms and final weights lie apart.
Works without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from launch.cli.command import Arguments, read_command, report_mistakes
from launch.equivalence.compare_strategies import compare_strategies
from launch.equivalence.parity_cases import Comparison
from launch.equivalence.run_arguments import choose_strategies, drop_keys
from launch.runtime.exit_codes import ExitCode
from strategies import STRATEGIES
from strategies.options import PositiveInt

EXITS = {ExitCode.DONE: "they agree", ExitCode.FAILED: "a row failed"}


@dataclass(kw_only=True)
class ParityOptions:
    """What `rankzero parity` takes besides the keys of a run."""

    ranks: Annotated[int, Ge(2)] = 2
    """processes of each strategy"""
    strategies: list[str] = field(default_factory=list)
    """those to compare with the single process, separated by commas (default: all that are installed)"""
    compare: PositiveInt = 5
    """steps of the run to compare"""


def main(argv: list[str]) -> int:
    """Compare; returns the exit code."""
    arguments = read_command(argv, __doc__, ParityOptions, name="parity", takes_run=True, exits=EXITS)
    with report_mistakes():
        comparison, run_argv = comparison_of(arguments)
        settings = arguments.settings("strategy=single")
    return compare_strategies(settings, run_argv, comparison)


def comparison_of(arguments: Arguments[ParityOptions]) -> tuple[Comparison, list[str]]:
    """What to compare, and the arguments of the run without its strategy. Raises ValueError."""
    options = arguments.options
    everywhere = [name for name in STRATEGIES if name != "single"]
    strategies = choose_strategies(options.strategies, everywhere, everywhere)
    comparison = Comparison(ranks=options.ranks, steps=options.compare, strategies=strategies)
    return comparison, drop_keys(arguments.run_argv, ["strategy"])
