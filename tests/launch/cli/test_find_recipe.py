"""Where recipes come from: built in, a file, a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.cli.help import page
from launch.cli.resolve import find_recipe, resolve
from launch.runtime.world import World
from tests.launch.cli.test_resolve import said
from tests.launch.processes import TINY


def test_where_recipes_come_from() -> None:
    assert find_recipe("tests.launch.tiny:Sort").__name__ == find_recipe(f"{TINY}:Sort").__name__ == "Sort"
    said("did you mean resnet?", "recipe=resnte")
    said("there is no such file", "recipe=./absent.py")
    said("recipe= is missing; built in are resnet", "recipe=")


def test_a_file_with_several_recipes_asks_which(tmp_path: Path) -> None:
    said("must hold one recipe, it has Fit, Sort", f"recipe={TINY}", "steps=1")
    said(f"say which: recipe={TINY}:Fit", f"recipe={TINY}", "steps=1")
    said(f"recipe={TINY}:Absent", f"recipe={TINY}:Absent", "steps=1")
    (tmp_path / "none.py").write_text("x = 1\n")
    said("derive a dataclass from recipes.base.Recipe", f"recipe={tmp_path / 'none.py'}")


BARE = """
from dataclasses import dataclass
from recipes.base import Recipe

class NotOne: ...

@dataclass(kw_only=True)
class Bare(Recipe):
    width: int
    lr: float = 0.1
"""


def test_a_recipe_without_docstrings(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    word = f"recipe={tmp_path / 'bare.py'}"
    text = page("usage", takes_run=True, recipe=str(tmp_path / "bare.py"))
    assert "lr=0.1" in text
    assert "width= " in text
    assert "MISSING" not in text
    assert "Bare(" not in text, "the docstring that dataclass makes up is no help"
    said("width= is missing; it is int", word, "steps=1")
    recipe: Any = resolve([word, "steps=1", "width=4"], World()).recipe
    assert (recipe.width, recipe.lr) == (4, 0.1)


def test_a_recipe_that_clashes_with_a_key_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clash.py").write_text(BARE.replace("lr: float", "seed: float"))
    said("Bare.seed", f"recipe={tmp_path / 'clash.py'}", "steps=1", "width=1")
