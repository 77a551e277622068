"""`--help`: every key once, under a heading, in the width of the terminal."""

from __future__ import annotations

import re

import pytest

from launch.cli.config import HEADINGS, Config
from launch.cli.help import page
from launch.cli.keys import keys_of
from launch.cli.resolve import find_recipe
from launch.commands.parity import ParityOptions
from recipes import RECIPES


def names_in(text: str) -> list[str]:
    """The keys that begin a line."""
    return re.findall(r"^  ([\w.]+)=", text, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80, 110, 120])
@pytest.mark.parametrize("recipe", ["", *RECIPES])
def test_each_key_stands_once_and_no_line_is_too_long(recipe: str, width: int) -> None:
    text = page("Train.", ParityOptions, takes_run=True, recipe=recipe, width=width)
    wanted = [*keys_of(ParityOptions), *keys_of(Config)]
    wanted += [*keys_of(find_recipe(recipe))] if recipe else []
    assert sorted(names_in(text)) == sorted(key.name for key in wanted)
    assert max(map(len, text.splitlines())) <= max(width, 72)


def test_own_options_come_first_then_recipe() -> None:
    names = names_in(page("Train.", ParityOptions, takes_run=True))
    own = [key.name for key in keys_of(ParityOptions)]
    assert names[: len(own) + 1] == [*own, "recipe"]


def test_each_key_of_a_run_has_one_heading() -> None:
    listed = [name for names in HEADINGS.values() for name in names]
    assert sorted(listed) == sorted({key.name.partition(".")[0] for key in keys_of(Config)})


def test_examples_keep_their_lines_and_prose_is_wrapped() -> None:
    text = page(
        "One sentence that is rather long for so narrow a page.\n\n    rankzero train recipe=gpt\n", width=30
    )
    assert text.startswith(
        "One sentence that is rather\nlong for so narrow a page.\n\n    rankzero train recipe=gpt\n"
    )
