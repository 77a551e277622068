"""From recipe defaults, a YAML file and key=value arguments to checked settings. No torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli.check_config import validate
from launch.cli.config import Config
from launch.cli.keys import Key, build, check_known, keys_of, parse_value, read_argv, read_yaml
from launch.runtime.world import World
from recipes import RECIPES
from recipes.base import Recipe
from recipes.parts.hook_names import refuse_foreign_hooks

DEBUG = {"workers": 0, "log.every": 1}
"""what `debug` sets unless the command line does: data errors in this process, each step on the screen"""


@dataclass(frozen=True)
class Settings:
    """What was asked for, resolved and checked."""

    config: Config
    recipe: Recipe


def resolve(argv: Sequence[str], world: World, own: Mapping[str, Key] | None = None) -> Settings:
    """The run that `argv` (key=value) describes. Recipe defaults, then the `config=` file, then argv; the
    last wins.

    `own` are the command's own keys, which a misspelt key may have been meant for. Raises ValueError or
    FileNotFoundError, in one line for the user.
    """
    line = read_argv(argv)
    file = read_yaml(line["config"]) if "config" in line else {}
    name = str(line.get("recipe", file.get("recipe", "")))
    if not name:
        raise ValueError(
            f"recipe= is missing; built in are {', '.join(RECIPES)}, or name a file (recipe=./mine.py)"
        )
    run_keys = {key.name: key for key in keys_of(Config)}
    # a key without a dot can only be the run's or a flat field of the recipe: the recipe is imported to know
    owner = find_recipe(name)
    recipe_keys = {key.name: key for key in keys_of(owner)}
    known = recipe_keys | run_keys
    if clash := sorted(recipe_keys.keys() & run_keys.keys()):
        raise ValueError(
            f"{owner.__name__}.{clash[0]} of recipe {name} is also a key of every run; "
            "give the field another name"
        )
    check_known(file, known, f"recipe {name}, in {line.get('config')}")
    check_known(line, known | dict(own or {}), f"recipe {name}")
    check_known(owner.defaults, run_keys, f"a run, in {owner.__name__}.defaults")
    values = merge(
        owner.defaults, file, {name: parse_value(text, known[name]) for name, text in line.items()}
    )
    config = build(Config, {key: value for key, value in values.items() if key in run_keys})
    recipe = build(owner, {key: value for key, value in values.items() if key in recipe_keys})
    if config.strategy == "auto":
        config.strategy = "single" if world.world_size == 1 else "ddp"
    validate(config, recipe, world)
    return Settings(config, recipe)


def merge(defaults: Mapping[str, Any], file: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all layers, the last one winning."""
    values = dict(defaults)
    for layer in (file, line):
        if ("steps" in layer) != ("epochs" in layer):  # the one that was given replaces the other's default
            values["epochs" if "steps" in layer else "steps"] = None
        values.update(layer)
    return {**values, **DEBUG, **line} if values.get("debug") else values


def find_recipe(name: str) -> type[Recipe]:
    """The recipe class behind `recipe=`: a built-in name, a file, or a dotted module with an optional
    `:Class`.
    """
    path, _, wanted = name.partition(":")
    if path in RECIPES:
        module = importlib.import_module(RECIPES[path])
    elif path.endswith(".py"):
        module = import_file(Path(path))
    elif "." in path and importlib.util.find_spec(path.split(".")[0]) is not None:
        module = importlib.import_module(path)
    else:
        near = difflib.get_close_matches(path, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"recipe={name} is unknown; {hint}built in are {', '.join(RECIPES)}, or name a file (./mine.py)"
        )
    recipes = {
        item.__name__: item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Recipe) and item.__module__ == module.__name__
    }
    if wanted:
        recipes = {wanted: recipes[wanted]} if wanted in recipes else {}
    if len(recipes) != 1:
        fix = (
            f"say which: recipe={path}:{next(iter(recipes))}"
            if recipes
            else "derive a dataclass from recipes.base.Recipe"
        )
        raise ValueError(f"recipe={name} must hold one recipe, it has {', '.join(recipes) or 'none'}; {fix}")
    owner = next(iter(recipes.values()))
    refuse_foreign_hooks(owner)
    return owner


def import_file(path: Path) -> Any:
    """A user's recipe file as a module; what stands beside it can be imported, as under `python mine.py`."""
    if not path.is_file():
        raise ValueError(f"recipe={path}: there is no such file")
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and data-loading workers look their module up
    spec.loader.exec_module(module)
    return module
