"""What the subcommands of `rankzero ckpt` share: checkpoints found and opened, tables and progress bars.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import MANIFEST_NAME
from launch.cli.rich_table import make_table

if TYPE_CHECKING:
    from launch.checkpoint.reader import Checkpoint


class CheckpointRemoved(ValueError):
    """A checkpoint that existed a moment ago; the message says why it no longer does."""


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
