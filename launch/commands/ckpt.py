"""Look into the checkpoints of a run, and take weights out of them.

PATH, A and B are a checkpoint (runs/a/checkpoints/step-00000100) or a run (runs/a: its newest checkpoint).
Works while the run goes on, on any machine that sees its files, whatever the strategy and the number of ranks
that wrote them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from launch.checkpoint import inspection
from launch.checkpoint.manifest import DamagedCheckpoint
from launch.cli.command import Arguments, Subcommand, run_subcommand
from launch.runtime.exit_codes import ExitCode
from strategies.options import PositiveInt

EXITS = {
    ExitCode.DONE: "done; intact; the same",
    ExitCode.FAILED: "damaged; (diff) other tensors or optimizers",
    ExitCode.INTERRUPTED: "interrupted",
}


@dataclass(kw_only=True)
class DiffOptions:
    """Of `ckpt diff`."""

    all: bool = False
    """every tensor that differs, not only the first 20"""


@dataclass(kw_only=True)
class ExportOptions:
    """Of `ckpt export`."""

    to: str = ""
    """the file to write, which ends in .safetensors and does not exist yet"""
    model: str | None = None
    """one of several models (default: all of them, as MODEL.PARAMETER)"""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """convert floating-point weights (default: as they are)"""
    shard_gb: Annotated[float, Gt(0), Lt(1e6)] = 5.0
    """cut a larger file into parts of this many GB, and write an index as Hugging Face does"""


@dataclass(kw_only=True)
class PruneOptions:
    """Of `ckpt prune`."""

    keep: PositiveInt
    """newest checkpoints to keep; the best is kept too, if the run keeps it"""


def on_paths(function: Callable[..., int]) -> Callable[[Arguments[Any]], int]:
    """A subcommand that calls `function` with its paths and, by name, its options.

    A damaged checkpoint is a failure (1), not a mistake in the command (2).
    """

    def call(arguments: Arguments[Any]) -> int:
        paths = [Path(argument) for argument in arguments.positional]
        try:
            return function(*paths, **vars(arguments.options))
        except BrokenPipeError:
            raise
        except (DamagedCheckpoint, OSError) as error:
            print(f"rankzero: {error}", file=sys.stderr)
            return ExitCode.FAILED

    return call


SUBCOMMANDS = {
    "list": Subcommand(
        call=on_paths(inspection.list_run), summary="the checkpoints of a run", positional=("RUN",)
    ),
    "inspect": Subcommand(
        call=on_paths(inspection.inspect),
        summary="what is in one: step, layout, sizes, configuration, versions",
        positional=("PATH",),
    ),
    "verify": Subcommand(
        call=on_paths(inspection.verify),
        summary="read every byte and compare digests; of a run: of all",
        positional=("PATH",),
    ),
    "diff": Subcommand(
        call=on_paths(inspection.diff),
        summary="keys, optimizers and tensors that differ, furthest apart first",
        options=DiffOptions,
        positional=("A", "B"),
    ),
    "export": Subcommand(
        call=on_paths(inspection.export),
        summary="weights as plain files",
        options=ExportOptions,
        positional=("PATH",),
    ),
    "prune": Subcommand(
        call=on_paths(inspection.prune),
        summary="remove all but the newest",
        options=PruneOptions,
        positional=("RUN",),
    ),
}


def main(argv: list[str]) -> int:
    """Do what `argv` asks for; returns the exit code."""
    return run_subcommand(argv, __doc__, SUBCOMMANDS, exits=EXITS)
