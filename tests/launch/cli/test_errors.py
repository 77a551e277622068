"""A mistake in the command: one line, exit code 2, at once. The real command, as users start it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.config import Config
from launch.cli.help import docstrings
from launch.cli.keys import keys_of
from launch.cli.resolve import find_recipe
from recipes import RECIPES
from tests.launch.processes import RUN_SCRIPT, run_command

HIDE_DEEPSPEED = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hide(cls, name, *rest):
    return None if name == "deepspeed" else find(name, *rest)
PathFinder.find_spec = classmethod(hide)
"""
TELL_TORCH = """
import atexit, os, sys
if "TORCHELASTIC_RUN_ID" in os.environ or not any("torch" in word for word in sys.orig_argv):
    atexit.register(lambda: "torch" in sys.modules and print("rankzero: torch was imported", file=sys.stderr))
"""
"""said by each process that has imported it, but torchrun itself, which must"""

MISTAKES = {
    "misspelt key": (["optim.lrr=0.1"], "optim.lr"),
    "misplaced key": (["lr=0.1"], "optim.lr"),
    "bad type": (["batch_size=many"], "batch_size=many is not int"),
    "unknown recipe": (["recipe=resnte"], "resnet"),
    "impossible split": (["micro_batch_size=7"], "micro_batch_size=8"),
    "absent data folder": (["data.name=mnist", "data.root=absent"], "data.root=absent"),
    "no deepspeed": (["strategy=zero3"], "pip install deepspeed"),
    "run directory of another recipe": (["run_dir=other"], "belongs to recipe=gpt"),
    "no key=value": (["resnet"], "key=value"),
}
UNDER_TORCHRUN = ("misspelt key", "impossible split", "run directory of another recipe")
"""one of each place that refuses: the words, what depends on the ranks, what lies on the disk; one answer is
for all
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder: deepspeed hidden from what starts in it, and the run of another recipe in `other`."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("recipe: gpt\n")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE_DEEPSPEED + TELL_TORCH)
    return tmp_path


def words_of(mistake: str) -> list[str]:
    words, _ = MISTAKES[mistake]
    return words if any(word.startswith("recipe=") for word in words) else ["recipe=resnet", *words]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, mistake: str) -> None:
    ended = run_command(*words_of(mistake), cwd=folder, env={"PYTHONPATH": str(folder / "hidden")})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == len(ended.messages) == 1, ended.stderr
    assert MISTAKES[mistake][1] in ended.stderr
    assert not (folder / "runs").exists(), "a refused run leaves nothing"


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(name, marks=[] if name == UNDER_TORCHRUN[0] else pytest.mark.slow)
        for name in UNDER_TORCHRUN
    ],
)
def test_a_mistake_is_one_line_in_all_under_torchrun(folder: Path, mistake: str) -> None:
    ended = run_command(*words_of(mistake), cwd=folder, ranks=4, env={"PYTHONPATH": str(folder / "hidden")})
    assert len(ended.messages) == 1, ended.stderr
    assert MISTAKES[mistake][1] in ended.messages[0]
    assert str(RUN_SCRIPT.parent) not in "".join(re.findall(r'File "(.*)"', ended.stderr)), (
        "a traceback of ours"
    )
    # torchrun reports each failed rank in its own words and exits 1 itself; a rank that it ended first shows
    # a signal
    codes = [int(code) for code in re.findall(r"exitcode *: (-?\d+)", ended.stderr)]
    assert 2 in codes, ended.stderr
    assert set(codes) <= {2, -15}, ended.stderr


@pytest.mark.parametrize("words", [["--help"], ["recipe=resnet", "--help"], ["recipe=gpt", "-h"]])
def test_help_imports_no_torch(tmp_path: Path, words: list[str]) -> None:
    spy = [sys.executable, "-X", "importtime", str(RUN_SCRIPT), *words]
    ended = subprocess.run(spy, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "yaml" in imported, "the spy sees nothing"
    assert not imported & {"torch", "numpy", "pydantic", "torchvision", "deepspeed"}


def test_help_tells_each_key_with_type_default_and_meaning(tmp_path: Path) -> None:
    general, resnet = (
        run_command("--help", cwd=tmp_path, env={"COLUMNS": "110"}).stdout,
        run_command("recipe=resnet", "--help", cwd=tmp_path, env={"COLUMNS": "110"}).stdout,
    )
    assert re.search(r"^ +batch_size=64 +int +GLOBAL batch", general, re.MULTILINE)
    assert re.search(r"^ +precision=fp32 +fp32\|tf32\|bf16\|fp16 +\w", general, re.MULTILINE)
    assert re.search(r"^ +checkpoint.every= +int\|null +steps between", general, re.MULTILINE)
    assert "torchrun --nproc_per_node=2" in general
    assert "model.depth" not in general
    assert re.search(r"^ +model.depth=18 +18\|34\|50\|101\|152 +\w", resnet, re.MULTILINE)
    assert re.search(r"^ +optim.lr=0.02 +float +\w", resnet, re.MULTILINE), (
        "the recipe's default, not that of its parts"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_no_key_is_without_help(name: str) -> None:
    keys = [*keys_of(Config), *keys_of(find_recipe(name))]
    assert not [key.name for key in keys if not docstrings(key.owner).get(key.name.rpartition(".")[2])]
