"""What every command does with its command line: `--help`, its own options, positional arguments, the keys of
a run, one line for a mistake. No torch.

A command's own options are a dataclass: the docstring under a field is its line in `--help`, the annotated
type its range. `read_command` is all that a command or a script needs; `run_subcommand` is for those that
have several, such as `ckpt`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from launch.cli import help
from launch.cli.exits import exit_with_mistake
from launch.cli.keys import Key, build, check_known, keys_of, parse_value, read_argv
from launch.cli.resolve import Settings, resolve
from launch.runtime.exit_codes import ExitCode
from launch.runtime.world import World, find_world

T = TypeVar("T")
HELP = ("--help", "-h")


@dataclass(kw_only=True)
class NoOptions:
    """The options of a command that has none."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[T]):
    """A command line, read."""

    options: T
    """the command's own"""
    positional: list[str] = field(default_factory=list)
    """as many as the command takes"""
    run_argv: list[str] = field(default_factory=list)
    """the other key=value arguments, as given: those of a run, for `settings`"""
    world: World = field(default_factory=World)
    """of this process; of one alone where the command is not started on ranks"""

    def settings(self, *overrides: str, world: World | None = None) -> Settings:
        """The run that was asked for, with `overrides` (key=value) behind; its world is this one unless
        given.

        Raises ValueError or FileNotFoundError, in one line for the user.
        """
        own = {key.name: key for key in keys_of(type(self.options))}
        return resolve([*self.run_argv, *overrides], world or self.world, own)


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """One of the things that a command does."""

    call: Callable[[Arguments[Any]], int]
    """takes the arguments, returns the exit code; ValueError is a mistake of the user's"""
    summary: str
    options: type = NoOptions
    positional: tuple[str, ...] = ()
    takes_run: bool = False


def read_command(
    argv: Sequence[str],
    manual: str | None,
    options: type[T],
    *,
    name: str = "this command",
    positional: tuple[str, ...] = (),
    takes_run: bool = False,
    on_ranks: bool = False,
    exits: Mapping[ExitCode, str] | None = None,
) -> Arguments[T]:
    """The command line of a command. Ends the process after `--help` (0) or a mistake (2, in one line).

    `name`: what messages call it. `positional`: the names of its positional arguments. `takes_run`: the keys
    of a run are its keys too. `on_ranks`: it may be started by torchrun or srun, one process a rank; rank
    zero reports a mistake for all. `exits`: what its exit codes mean, where it is not what `exits.MEANINGS`
    says.
    """
    if any(argument in HELP for argument in argv):
        recipe = value_of("recipe", argv)
        with report_mistakes():
            text = help.page(manual or "", options, takes_run=takes_run, recipe=recipe, exits=exits)
        print(text)
        raise SystemExit(ExitCode.DONE)
    world = World()
    if on_ranks:
        with report_mistakes():
            # before the first mistake: one rank reports it
            world = find_world(os.environ, value_of("launcher", argv) or "auto")
    with report_mistakes(world.rank):
        return read_arguments(
            argv, options, name=name, positional=positional, takes_run=takes_run, world=world
        )


def run_subcommand(
    argv: Sequence[str],
    manual: str | None,
    subcommands: Mapping[str, Subcommand],
    *,
    default: str = "",
    exits: Mapping[ExitCode, str] | None = None,
) -> int:
    """Do what the first argument names, or the subcommand `default`; returns the exit code.

    No argument at all is `--help`, `NAME --help` the help of one subcommand. Ends the process after a mistake
    (2, in one line).
    """
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in subcommands else (default, argv)
    if not argv or (argv[0] in HELP and len(argv) == 1):
        print(help.page(f"{(manual or '').strip()}\n\n{summaries(subcommands)}", exits=exits))
        return ExitCode.DONE
    with report_mistakes():
        if name not in subcommands:
            raise ValueError(f"{argv[0]!r} is not a command; there are {', '.join(subcommands)}")
    chosen = subcommands[name]
    arguments: Arguments[Any] = read_command(
        rest,
        f"{' '.join([name, *chosen.positional])}: {chosen.summary}",
        chosen.options,
        name=name,
        positional=chosen.positional,
        takes_run=chosen.takes_run,
        exits=exits,
    )
    with report_mistakes(kinds=(ValueError,)):
        return chosen.call(arguments)


def read_arguments(
    argv: Sequence[str],
    options: type[T],
    *,
    name: str = "this command",
    positional: tuple[str, ...] = (),
    takes_run: bool = False,
    world: World | None = None,
) -> Arguments[T]:
    """The arguments of a command. Raises ValueError, in one line for the user."""
    own = {key.name: key for key in keys_of(options)}
    paths = [argument for argument in argv if positional and not is_key_value(argument)]
    assigned = [argument for argument in argv if not positional or is_key_value(argument)]
    if len(paths) != len(positional):
        wanted, given = " and ".join(positional), " ".join(paths) or "none"
        raise ValueError(f"{name} takes {wanted}, given is {given}; `--help` is the manual")
    flags = {f"--{key.name}": f"{key.name}=true" for key in own.values() if key.hint is bool}
    values = read_argv([flags.get(argument, argument) for argument in assigned])
    ours = {name: text for name, text in values.items() if name in own}
    others = [f"{name}={text}" for name, text in values.items() if name not in own]
    if not takes_run:
        check_known(values, own, name)
    return Arguments(
        options=options_from(options, ours, own),
        positional=paths,
        run_argv=others,
        world=world or World(),
    )


def options_from(options: type[T], values: Mapping[str, str], keys: Mapping[str, Key]) -> T:
    """Options from key=value texts. Raises ValueError."""
    return build(options, {name: parse_value(text, keys[name]) for name, text in values.items()})


def is_key_value(argument: str) -> bool:
    """Whether it is key=value and not a path with a `=` in it."""
    name, equals, _ = argument.removeprefix("--").partition("=")
    return bool(equals) and name.isidentifier() and not Path(argument).exists()


def value_of(name: str, argv: Sequence[str]) -> str:
    """The value of a key that is needed before the others are read; "" if it is not given."""
    values = (argument.removeprefix("--").partition("=") for argument in argv)
    return next((value for key, equals, value in values if key == name and equals), "")


@contextmanager
def report_mistakes(
    rank: int = 0, kinds: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
) -> Iterator[None]:
    """Around what refuses a user's mistake: one line from rank zero, and the end of the process with 2."""
    try:
        yield
    except kinds as error:
        exit_with_mistake(error, rank)


def summaries(subcommands: Mapping[str, Subcommand]) -> str:
    """The subcommands, a line each, with their own options under them."""
    heads = {" ".join([name, *item.positional]): item for name, item in subcommands.items()}
    left = max(map(len, heads))
    lines = []
    for head, item in heads.items():
        lines.append(f"  {head:{left}}  {item.summary}")
        lines += [
            "  " + line for line in help.key_table(list(keys_of(item.options)), help.screen_width() - 2)
        ]
    return "\n".join(lines)
