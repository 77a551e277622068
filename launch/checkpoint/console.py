"""What `launch/commands/ckpt.py` needs: words read, checkpoints found, tables and progress shown. Imports no
torch.
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
from launch.checkpoint.manifest import NAME
from launch.cli.config import build, check_known, keys_of

if TYPE_CHECKING:
    from launch.checkpoint.reader import Checkpoint

Command = Callable[..., int]


class Removed(ValueError):
    """A checkpoint that was there a moment ago; the message says why."""


def read(words: Sequence[str], commands: Mapping[str, Command]) -> Callable[[], int]:
    """The command that `words` call, ready to be run. Raises ValueError, in words, for what it does not take.

    Its paths are what the function takes by position, its options (key=value) what stands behind the star.
    """
    name, *rest = words
    if name not in commands:
        raise ValueError(f"{name!r} is not a command; there are {', '.join(commands)}")
    command, hints = commands[name], get_type_hints(commands[name])
    parameters = signature(command).parameters.values()
    wanted = [p.name.upper() for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
    said = {word.partition("=")[0]: word.partition("=")[2] for word in rest if is_option(word)}
    paths = [Path(word) for word in rest if not is_option(word)]
    if len(paths) != len(wanted):
        given = " ".join(str(path) for path in paths) or "none"
        raise ValueError(f"{name} takes {' and '.join(wanted)}, given is {given}; `--help` is the manual")
    fields = [
        (p.name, hints[p.name], field(default=MISSING if p.default is Parameter.empty else p.default))
        for p in parameters
        if p.kind is Parameter.KEYWORD_ONLY
    ]
    options = make_dataclass("Options", fields, kw_only=True)
    known = {key.name: key for key in keys_of(options)}
    check_known(said, known, name)
    return partial(command, *paths, **vars(build(options, said)))


def is_option(word: str) -> bool:
    """Whether it is key=value and not a path with a `=` in it."""
    name, equals, _ = word.partition("=")
    return bool(equals) and name.isidentifier() and not Path(word).exists()


# checkpoints ------------------------------------------------------------------------------------------------


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself or, of a run, the newest. Raises ValueError if there is none."""
    if (path / NAME).is_file():
        return path
    if found := list_checkpoints(path):
        return found[-1]
    if others := list_checkpoints(path.parent.parent):
        raise ValueError(
            f"{path} is not there, or no longer; the run has {', '.join(folder.name for folder in others)}"
        )
    raise ValueError(
        f"{path} is neither a checkpoint nor a run that has one; give runs/NAME/TIME or .../checkpoints/step-NNNNNNNN"
    )


@contextmanager
def unless_removed(folder: Path) -> Iterator[Path]:
    """Around reading a checkpoint, which its run may remove at any time. Raises Removed if that has happened."""
    try:
        yield folder
    except (OSError, ValueError):
        if folder.exists():
            raise
        raise Removed(
            f"{folder} has just been removed: its run goes on, and keeps the newest; try again"
        ) from None


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint that `path` means, open: its run does not remove it meanwhile."""
    from launch.checkpoint.reader import Checkpoint

    with unless_removed(find(path)) as folder, Checkpoint(folder) as checkpoint:
        yield checkpoint


# screen -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. A column whose name begins with > is of numbers; the last one may take several lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        numbers = name.startswith(">")
        made.add_column(
            name.lstrip(">"),
            justify="right" if numbers else "left",
            no_wrap=name != columns[-1],
            overflow="fold",
        )
    for row in rows:
        made.add_row(*row)
    screen = Console(markup=False, highlight=False)
    if not screen.is_terminal:
        screen.width = 10_000  # who reads a pipe wants whole lines
    screen.print(made)


@contextmanager
def progress(words: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes while the block lasts, on a terminal; what it yields hears of each number of bytes done."""
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
        task = bar.add_task(words, total=total)
        yield lambda count: bar.advance(task, count)
