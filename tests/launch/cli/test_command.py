"""What all commands do with their command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
from annotated_types import Ge

from launch.cli.command import (
    Arguments,
    NoOptions,
    Subcommand,
    read_arguments,
    read_command,
    report_mistakes,
    run_subcommand,
)
from launch.runtime.world import World


@dataclass(kw_only=True)
class Choices:
    """Options."""

    ranks: list[Annotated[int, Ge(2)]] = field(default_factory=lambda: [2])
    """numbers of processes"""
    name: str | None = None
    """any text"""
    force: bool = False
    """whatever the cost"""


def refusal(*argv: str, positional: tuple[str, ...] = (), takes_run: bool = False) -> str:
    """The line for arguments that cannot be."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is looked at by the caller
        read_arguments(argv, Choices, name="choose", positional=positional, takes_run=takes_run)
    return str(error.value)


def test_own_options_are_parsed_and_the_rest_is_the_run_s() -> None:
    arguments = read_arguments(
        ["recipe=gpt", "ranks=2,4", "--name=a=b", "seed=1", "--force"], Choices, takes_run=True
    )
    assert arguments.options == Choices(ranks=[2, 4], name="a=b", force=True)
    assert arguments.run_argv == ["recipe=gpt", "seed=1"]
    assert arguments.world == World()


def test_the_settings_are_those_of_the_run_with_overrides_behind() -> None:
    arguments = read_arguments(["recipe=gpt", "steps=3"], Choices, takes_run=True)
    config = arguments.settings("steps=5", world=World(world_size=2)).config
    assert (config.recipe, config.steps, config.strategy) == ("gpt", 5, "ddp")


def test_a_misspelt_option_is_found_among_the_command_s_own() -> None:
    arguments = read_arguments(["recipe=gpt", "rankks=3"], Choices, takes_run=True)
    with pytest.raises(ValueError, match="rankks is not a key of recipe gpt; did you mean ranks"):
        arguments.settings()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ranks=1",), "ranks=[1]: each must be 2 or more (default: [2])"),
        (("ranks=two",), "ranks=[two] is not list[int] (default: [2])"),
        (("force=yes",), "force=yes is not true|false (default: false)"),
        (("nmae=x",), "nmae is not a key of choose; did you mean name?"),
        (("recipe=gpt",), "recipe is not a key of choose; `--help` lists the keys"),
        (("fast",), "'fast' is not key=value; `--help` lists the keys"),
    ],
)
def test_mistakes(argv: tuple[str, ...], message: str) -> None:
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "choose takes A and B, given is none; `--help` is the manual"),
        (("x",), "choose takes A and B, given is x; `--help` is the manual"),
        (("x", "y", "z"), "choose takes A and B, given is x y z; `--help` is the manual"),
        (("x", "y", "ranks=1"), "ranks=[1]: each must be 2 or more (default: [2])"),
    ],
)
def test_positional_arguments_are_counted(argv: tuple[str, ...], message: str) -> None:
    assert refusal(*argv, positional=("A", "B")) == message


def test_a_mistake_ends_the_process_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read_command(["ranks=1"], "Choose.", Choices, name="choose")
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "rankzero: ranks=[1]: each must be 2 or more (default: [2])\n")


def test_only_what_is_a_mistake_is_reported_as_one() -> None:
    with pytest.raises(RuntimeError), report_mistakes():
        raise RuntimeError("a bug")


def test_the_world_of_a_rank_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert read_command([], "Choose.", Choices, on_ranks=True).world.rank == 1
    assert read_command([], "Choose.", Choices).world == World(), "this command is one process"


def test_help_holds_manual_options_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read_command(["--help"], "Choose.\n\n    rankzero choose name=x\n", Choices, name="choose")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Choose.\n\n    rankzero choose name=x\n\nOptions (key=value)\n  ranks=[2] ")
    assert "whatever the cost" in text
    assert "Exit codes" in text
    assert "recipe=" not in text


def cut(arguments: Arguments[Choices]) -> int:
    """A subcommand."""
    if arguments.options.force:
        raise ValueError("not by force")
    return len(arguments.positional)


def do_nothing(_: Arguments[NoOptions]) -> int:
    """Another."""
    return 0


SUBCOMMANDS = {
    "cut": Subcommand(call=cut, summary="cut in two", options=Choices, positional=("FILE",)),
    "rest": Subcommand(call=do_nothing, summary="do nothing", options=NoOptions),
}


def test_a_subcommand_gets_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_subcommand(["cut", "a.txt"], "Tailor.", SUBCOMMANDS) == 1
    assert run_subcommand(["rest"], "Tailor.", SUBCOMMANDS) == 0
    assert run_subcommand(["a.txt"], "Tailor.", SUBCOMMANDS, default="cut") == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cuts"], "'cuts' is not a command; there are cut, rest"),
        (["cut"], "cut takes FILE, given is none"),
        (["cut", "a.txt", "force=true"], "not by force"),
        (["rest", "ranks=2"], "ranks is not a key of rest"),
    ],
)
def test_mistakes_of_subcommands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_subcommand(argv, "Tailor.", SUBCOMMANDS)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_one_subcommand_and_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_subcommand([], "Tailor.", SUBCOMMANDS) == run_subcommand(["--help"], "Tailor.", SUBCOMMANDS)
    text = capsys.readouterr().out
    assert "  cut FILE  cut in two" in text
    assert "ranks=[2]" in text
    with pytest.raises(SystemExit):
        run_subcommand(["rest", "--help"], "Tailor.", SUBCOMMANDS)
    text = capsys.readouterr().out
    assert text.startswith("rest: do nothing")
    assert "cut FILE" not in text
