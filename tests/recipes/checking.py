"""Options and recipes, checked as the command line checks them: types and ranges, then combinations."""

from __future__ import annotations

from dataclasses import field, make_dataclass

from launch.cli.keys import build, flatten, to_dict
from recipes.base import Recipe
from recipes.parts.option_types import OptionGroup, check_groups


def check_options(group: str, options: OptionGroup) -> None:
    """Raise ValueError or FileNotFoundError for `options` as the keys `group.*` of a recipe."""
    kind = type(options)
    owner = make_dataclass("Owner", [(group, kind, field(default_factory=kind))], kw_only=True)
    build(owner, {f"{group}.{name}": value for name, value in flatten(to_dict(options))})
    options.check(kind())


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError or FileNotFoundError for the fields of a recipe."""
    build(type(recipe), dict(flatten(to_dict(recipe))))
    check_groups(recipe)
    recipe.check()
