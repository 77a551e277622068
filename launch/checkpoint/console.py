"""What the subcommands of `rankzero ckpt` share: arguments, checkpoints found and opened, tables and progress
bars. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, make_dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import MANIFEST_NAME
from launch.cli.config import build, check_known, keys_of
from launch.cli.rich_table import make_table

if TYPE_CHECKING:
    from launch.checkpoint.reader import Checkpoint

Subcommand = Callable[..., int]


class CheckpointRemoved(ValueError):
    """A checkpoint that existed a moment ago; the message says why it no longer does."""


def parse_subcommand(argv: Sequence[str], subcommands: Mapping[str, Subcommand]) -> Callable[[], int]:
    """The subcommand that `argv` calls, ready to be run. Raises ValueError, in one line, for a mistake.

    Its paths are what the function takes by position, its options (key=value) what stands behind the star.
    """
    name, *arguments = argv
    if name not in subcommands:
        raise ValueError(f"{name!r} is not a command; there are {', '.join(subcommands)}")
    subcommand, hints = subcommands[name], get_type_hints(subcommands[name])
    parameters = signature(subcommand).parameters.values()
    positional = [p.name.upper() for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
    overrides = {word.partition("=")[0]: word.partition("=")[2] for word in arguments if is_option(word)}
    paths = [Path(word) for word in arguments if not is_option(word)]
    if len(paths) != len(positional):
        given = " ".join(str(path) for path in paths) or "none"
        raise ValueError(f"{name} takes {' and '.join(positional)}, given is {given}; `--help` is the manual")
    fields = [
        (p.name, hints[p.name], field(default=MISSING if p.default is Parameter.empty else p.default))
        for p in parameters
        if p.kind is Parameter.KEYWORD_ONLY
    ]
    options = make_dataclass("Options", fields, kw_only=True)
    known = {key.name: key for key in keys_of(options)}
    check_known(overrides, known, name)
    return partial(subcommand, *paths, **vars(build(options, overrides)))


def is_option(argument: str) -> bool:
    """Whether it is key=value and not a path with a `=` in it."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and name.isidentifier() and not Path(argument).exists()


# checkpoints ------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself or, of a run, the newest.

    Raises ValueError if there is none.
    """
    if (path / MANIFEST_NAME).is_file():
        return path
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    if siblings := list_checkpoints(path.parent.parent):
        names = ", ".join(folder.name for folder in siblings)
        raise ValueError(f"{path} does not exist, or no longer; the run has {names}")
    raise ValueError(
        f"{path} is neither a checkpoint nor a run that has one; "
        "give runs/NAME/TIME or .../checkpoints/step-NNNNNNNN"
    )


@contextmanager
def report_removal(folder: Path) -> Iterator[Path]:
    """Around reading a checkpoint, which its run may remove at any time.

    Raises CheckpointRemoved if that has happened.
    """
    try:
        yield folder
    except (OSError, ValueError):
        if folder.exists():
            raise
        raise CheckpointRemoved(
            f"{folder} has just been removed: its run goes on, and keeps the newest; try again"
        ) from None


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint that `path` means, open: its run does not remove it meanwhile."""
    from launch.checkpoint.reader import Checkpoint

    with report_removal(find_checkpoint(path)) as folder, Checkpoint(folder) as checkpoint:
        yield checkpoint


# screen -----------------------------------------------------------------------------------------------------


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column whose heading begins with `>` is of numbers."""
    from rich.console import Console

    table = make_table(columns)
    for row in rows:
        table.add_row(*row)
    screen = Console(markup=False, highlight=False)
    if not screen.is_terminal:
        screen.width = 10_000  # who reads a pipe wants whole lines
    screen.print(table)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes while the block lasts, on a terminal.

    Yields the function to be called with each number of bytes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
