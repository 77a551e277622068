"""`rankzero` itself: what it lists, and which command it calls."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.commands import COMMANDS, main
from tests.launch.processes import ROOT, rankzero


def output(capsys: pytest.CaptureFixture[str], *argv: str, expect: int = 0) -> str:
    """What `rankzero ARGV` prints in this process, or for a mistake the one line on stderr."""
    try:
        code = main(list(argv))
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    out, err = capsys.readouterr()
    assert code == expect, out + err
    return err if expect else out


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_alone_it_lists_the_commands_by_what_one_wants_to_do(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output(capsys, *argv).splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if line in {command.heading for command in COMMANDS.values()}]
    assert headings == ["Train", "Prove", "Look into", "Cluster"]
    for name, command in COMMANDS.items():
        assert f"  {name:12}  {command.summary}" in lines


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trian", "'trian' is not a command; did you mean train?"),
        ("doctr", "did you mean doctor?"),
        ("resume-chek", "did you mean resume_check?"),
        ("recipe=gpt", "'recipe=gpt' is not a command; to train: rankzero train recipe=gpt"),
        ("xyz", "'xyz' is not a command; there are train, parity, resume_check, ckpt"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = output(capsys, argument, expect=2)
    assert message in line
    assert line.startswith("rankzero: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_manual_with_its_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = output(capsys, name, "--help")
        assert " ".join(text.split()).startswith((module.__doc__ or "").partition("\n")[0])
        assert "\nExit codes\n  0 " in text
        assert "\n  2    a mistake in the command, reported in one line" in text
        assert not [line for line in text.splitlines() if len(line) > columns]


def test_a_command_is_called_with_a_hyphen_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "resume-check", "--help") == output(capsys, "resume_check", "--help")


def test_the_files_of_the_commands_are_short() -> None:
    folder = ROOT / "launch" / "commands"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {name for name, item in COMMANDS.items() if item.module.startswith("launch.commands")}
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 130, path.name
        assert "__main__" not in text, "a command is started as `rankzero NAME`"
        assert "sys.path" not in text


def test_a_closed_pipe_is_no_failure(tmp_path: Path) -> None:
    process = subprocess.Popen(
        rankzero("train", "--help"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def test_the_console_script_is_this_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"rankzero": "launch.commands:main"}
    assert "slurm*" in project["tool"]["setuptools"]["packages"]["find"]["include"]


def test_listing_the_commands_imports_little(tmp_path: Path) -> None:
    spy = [sys.executable, "-X", "importtime", "-m", "launch"]
    done = subprocess.run(spy, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "launch.commands" in imported, "the spy sees nothing"
    assert not imported & {"yaml", "pydantic", "torch", "numpy", "rich", "launch.cli.resolve"}
