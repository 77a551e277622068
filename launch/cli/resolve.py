"""The command line that every command of `launch/` shares: from words to a checked configuration and recipe.
No torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from launch.cli.config import Config, build, check_known, keys_of, parse, read_file, read_line
from launch.cli.durations import parse_duration
from launch.cli.faults import parse_fault
from launch.runtime.world import World
from recipes import RECIPES
from recipes.base import Recipe
from recipes.parts.hook_names import refuse_foreign_hooks
from strategies import OPTIONS_GROUPS, STRATEGIES, missing_package, strategies_with
from strategies.options import CUDA_GRAPH_MODES

DEBUG = {"workers": 0, "log.every": 1}
"""what `debug` sets unless the command line says otherwise: data errors in this process, each step on the
screen
"""


@dataclass(frozen=True)
class Settings:
    """What was asked for, resolved and checked."""

    config: Config
    recipe: Recipe


def resolve(words: Sequence[str], world: World, extra: Sequence[str] = ()) -> Settings:
    """The run that `words` (key=value) describe. Recipe defaults, then `config=` file, then the words; the
    last wins.

    `extra` are keys that the command reads itself and that are passed over here. Raises ValueError or
    FileNotFoundError in words for the user.
    """
    line = {name: text for name, text in read_line(words).items() if name not in extra}
    file = read_file(line["config"]) if "config" in line else {}
    name = line.get("recipe", file.get("recipe"))
    if not name:
        raise ValueError(
            f"recipe= is missing; built in are {', '.join(RECIPES)}, or name a file (recipe=./mine.py)"
        )
    run_keys = {key.name: key for key in keys_of(Config)}
    # a key without a dot can only be the run's or a flat field of the recipe: the recipe is imported to know
    owner = find_recipe(str(name))
    recipe_keys = {key.name: key for key in keys_of(owner)}
    known = recipe_keys | run_keys
    if clash := sorted(recipe_keys.keys() & run_keys.keys()):
        raise ValueError(
            f"{owner.__name__}.{clash[0]} of recipe {name} is also a key of every run; give the field another name"
        )
    check_known(file, known, f"recipe {name}, in {line.get('config')}")
    check_known(line, known, f"recipe {name}")
    check_known(owner.defaults, run_keys, f"a run, in {owner.__name__}.defaults")
    parsed = {name: parse(text, known[name]) for name, text in line.items()}
    said = dict(owner.defaults)
    for layer in (file, parsed):
        if ("steps" in layer) != ("epochs" in layer):  # the one that was said replaces the other's default
            said["epochs" if "steps" in layer else "steps"] = None
        said.update(layer)
    if said.get("debug"):
        said = {**said, **DEBUG, **parsed}
    config: Config = build(Config, {key: value for key, value in said.items() if key in run_keys})
    recipe: Recipe = build(owner, {key: value for key, value in said.items() if key in recipe_keys})
    if config.strategy == "auto":
        config.strategy = "single" if world.world_size == 1 else "ddp"
    check(config, recipe, world)
    return Settings(config, recipe)


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
    found = {
        item.__name__: item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Recipe) and item.__module__ == module.__name__
    }
    if wanted:
        found = {wanted: found[wanted]} if wanted in found else {}
    if len(found) != 1:
        raise ValueError(
            f"recipe={name} must hold one recipe, it has {', '.join(found) or 'none'}; "
            + (
                f"say which: recipe={path}:{next(iter(found))}"
                if found
                else "derive a dataclass from recipes.base.Recipe"
            )
        )
    owner = next(iter(found.values()))
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


# combinations -----------------------------------------------------------------------------------------------


POSITIVE = (
    *(
        "epochs",
        "steps",
        "batch_size",
        "micro_batch_size",
        "clip_norm",
        "clip_value",
        "start_timeout",
        "hang_timeout",
    ),
    *(
        "checkpoint.every",
        "checkpoint.every_minutes",
        "checkpoint.keep",
        "eval.every",
        "eval.patience",
        "log.every",
    ),
)


def check(config: Config, recipe: Recipe, world: World) -> None:
    """Raise ValueError (FileNotFoundError for data) for values that are each right but cannot work together."""
    for name in POSITIVE:
        value = nested_value(config, name)
        if value not in (None, "auto") and value <= 0:
            raise ValueError(f"{name}={value} must be greater than 0")
    if config.max_time is not None:
        parse_duration(config.max_time)
    if config.chaos is not None and (rank := parse_fault(config.chaos).rank) >= world.world_size:
        raise ValueError(f"chaos={config.chaos}: there is no rank {rank} among {world.world_size}")
    for name in ("workers", "eval.min_delta"):
        value = nested_value(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    check_strategy(config, world)
    many = accumulation_steps(config, world)
    if many > 1 and config.ddp.static_graph:
        raise ValueError(
            f"ddp.static_graph=true does not go with {many} micro-batches a step: DDP would reduce wrong gradients; "
            "drop it, or raise micro_batch_size until each rank takes its share at once"
        )
    if config.micro_batch_size == "auto" and (config.ddp.static_graph or config.compile in CUDA_GRAPH_MODES):
        once = "ddp.static_graph=true" if config.ddp.static_graph else f"compile={config.compile}"
        raise ValueError(
            f"micro_batch_size=auto may lead to accumulation, and {once} does not go with it; drop one of the two"
        )
    if config.clip_norm is not None and config.clip_value is not None:
        raise ValueError("clip_norm and clip_value are both set; clip by one of them")
    if config.epochs is None and config.steps is None:
        raise ValueError("say how long to train: epochs=N or steps=N")
    if config.epochs is not None and config.steps is not None:
        raise ValueError(
            f"epochs={config.epochs} and steps={config.steps} are both set; say how long to train by one of them"
        )
    factory = next(item.default_factory for item in fields(recipe) if item.name == "schedule")
    recipe.schedule.check(factory() if factory is not MISSING else None)
    recipe.check()


def nested_value(config: Any, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_strategy(config: Config, world: World) -> None:
    """The strategy must fit the world, be installed, and own the options that were given for it."""
    strategy = config.strategy
    if strategy == "single" and world.world_size > 1:
        raise ValueError(
            f"strategy=single on {world.world_size} ranks; use strategy=ddp, or start one process"
        )
    if config.debug and world.world_size > 1:
        raise ValueError(f"debug=true is one process, not {world.world_size}; start it with plain python")
    if config.debug < 0:
        raise ValueError(f"debug={config.debug} must be true, false or a number of steps")
    if package := missing_package(strategy):
        raise ValueError(
            f"strategy={strategy} needs {package}, which is not installed: pip install {package}"
        )
    for group in OPTIONS_GROUPS:
        given = getattr(config, group)
        default = type(given)()
        if given != default and group != STRATEGIES[strategy].options_group:
            changed = next(key for key, value in vars(given).items() if value != getattr(default, key))
            raise ValueError(
                f"{group}.{changed} has no effect under strategy={strategy}; "
                f"drop it, or use strategy={'|'.join(strategies_with(group))}"
            )


def accumulation_steps(config: Config, world: World) -> int:
    """Micro-batches per rank and step, so that batch_size = micro_batch_size x accumulation x ranks
    (ValueError if not).
    """
    batch, ranks, given = config.batch_size, world.world_size, config.given_micro_batch_size
    micro = given or max(batch // ranks, 1)
    if batch % (micro * ranks) == 0:
        return batch // (micro * ranks)
    unit = micro * ranks if given else ranks
    parts = f"micro-batches of {micro}" if given else "equal parts"
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    sizes = " or ".join(f"batch_size={size}" for size in (below, above) if size > 0)
    fits = [m for m in range(1, batch // ranks + 1) if batch % (m * ranks) == 0]
    nearest = f" or micro_batch_size={min(fits, key=lambda m: abs(m - micro))}" if fits and given else ""
    raise ValueError(
        f"batch_size={batch} cannot be cut into {parts} over {ranks} rank(s); nearest: {sizes}{nearest}"
    )
