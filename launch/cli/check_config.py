"""Combinations of values that are each right but cannot work together. No torch."""

from __future__ import annotations

from launch.cli.config import Config
from launch.cli.durations import parse_duration
from launch.cli.fault_syntax import parse_fault
from launch.runtime.world import World
from recipes.base import Recipe
from recipes.parts.option_types import check_groups
from strategies import OPTIONS_GROUPS, STRATEGIES, missing_package, strategies_with
from strategies.options import CUDA_GRAPH_MODES


def validate(config: Config, recipe: Recipe, world: World) -> None:
    """Raise ValueError (FileNotFoundError for data) for values that are right but cannot work together."""
    validate_length(config)
    if config.chaos is not None and (rank := parse_fault(config.chaos).rank) >= world.world_size:
        raise ValueError(f"chaos={config.chaos}: there is no rank {rank} among {world.world_size}")
    if config.debug and world.world_size > 1:
        raise ValueError(f"debug=true is one process, not {world.world_size}; start it with plain python")
    if config.clip_norm is not None and config.clip_value is not None:
        raise ValueError("clip_norm and clip_value are both set; clip by one of them")
    validate_strategy(config, world)
    validate_accumulation(config, world)
    check_groups(recipe)
    recipe.check()


def validate_length(config: Config) -> None:
    """A run needs one length, and `max_time` must be a time. Raises ValueError."""
    if config.max_time is not None:
        parse_duration(config.max_time)
    if config.epochs is None and config.steps is None:
        raise ValueError("say how long to train: epochs=N or steps=N")
    if config.epochs is not None and config.steps is not None:
        raise ValueError(
            f"epochs={config.epochs} and steps={config.steps} are both set; "
            "say how long to train by one of them"
        )


def validate_strategy(config: Config, world: World) -> None:
    """The strategy must fit the world, be installed, and own the options that were given for it."""
    strategy = config.strategy
    if strategy == "single" and world.world_size > 1:
        raise ValueError(
            f"strategy=single on {world.world_size} ranks; use strategy=ddp, or start one process"
        )
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


def validate_accumulation(config: Config, world: World) -> None:
    """What fixes the graph of a step does not go with several micro-batches a step. Raises ValueError."""
    steps = accumulation_steps(config, world)
    if steps > 1 and config.ddp.static_graph:
        raise ValueError(
            f"ddp.static_graph=true does not go with {steps} micro-batches a step: DDP would reduce wrong "
            "gradients; drop it, or raise micro_batch_size until each rank takes its part at once"
        )
    if config.micro_batch_size == "auto" and (config.ddp.static_graph or config.compile in CUDA_GRAPH_MODES):
        fixed = "ddp.static_graph=true" if config.ddp.static_graph else f"compile={config.compile}"
        raise ValueError(
            f"micro_batch_size=auto may lead to accumulation, and {fixed} does not go with it; "
            "drop one of the two"
        )


def accumulation_steps(config: Config, world: World) -> int:
    """Gradient accumulation: micro-batches per rank and step, so that batch_size = micro_batch_size x
    accumulation x ranks. Raises ValueError if there is no such number.
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
