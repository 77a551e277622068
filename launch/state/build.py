"""Build a run: data sets, models and optimizers under their strategies."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from launch.cli.check_config import accumulation_steps
from launch.cli.config import Config
from launch.cli.resolve import Settings
from launch.data.batch_plan import BatchPlan
from launch.data.in_memory import as_in_memory, to_device_if_small
from launch.runtime.phase import Phase
from launch.runtime.seeding import seed_device
from launch.runtime.world import World
from launch.state.batchnorm import RunningStatistics
from launch.state.progress import TrainState
from launch.state.run import Run
from recipes.base import Recipe
from recipes.parts.data import InMemoryDataset, Splits
from strategies import strategy_class
from strategies.base import Strategy
from strategies.precision import set_matmul_precision


def prepare(settings: Settings, world: World, phase: Phase | None = None) -> Run:
    """Build the data sets and the models of a run. Collective where a strategy shards.

    Raises ValueError and FileNotFoundError in one line for the user: an empty data set, a bad option.
    """
    config, recipe = settings.config, settings.recipe
    set_matmul_precision(config.precision)
    if config.precision == "tf32" and world.device == "cpu":
        raise ValueError("precision=tf32 has no effect on a CPU; use fp32 or bf16")
    if config.sync_batchnorm and world.device == "cpu":
        raise ValueError(
            "sync_batchnorm=true needs CUDA; on a CPU a fixed micro_batch_size keeps BatchNorm "
            "independent of ranks"
        )
    splits = keep_in_memory(recipe.build_data(), world, config.workers)
    for name, split in vars(splits).items():
        if split is not None and len(split) == 0:
            raise ValueError(f"the {name} split of recipe={config.recipe} is empty")
    if splits.val is None:
        refuse_options_of_validation(config, recipe)
    accumulation = accumulation_steps(config, world)
    batch_plan = BatchPlan(
        micro_batch_size=config.batch_size // (accumulation * world.world_size),
        accumulation_steps=accumulation,
        rank=world.rank,
        world_size=world.world_size,
    )
    strategies = build_strategies(config, recipe, world)
    return Run(
        config=config,
        recipe=recipe,
        world=world,
        splits=splits,
        batch_plan=batch_plan,
        total_steps=config.steps or -(-(config.epochs or 0) * len(splits.train) // config.batch_size),
        strategies=strategies,
        statistics=RunningStatistics(strategy.module for strategy in strategies.values()),
        progress=TrainState(plateau=recipe.schedule.plateau()),
        phase=phase or Phase(),
    )


def keep_in_memory(splits: Splits, world: World, workers: int | None) -> Splits:
    """The splits, those that are in memory as `InMemoryDataset`; the training data on the GPU, if it is small
    and no data workers are asked for.
    """
    converted = {name: as_in_memory(split) or split for name, split in vars(splits).items()}
    if isinstance(converted["train"], InMemoryDataset) and not workers:
        converted["train"] = to_device_if_small(converted["train"], world.device)
    return Splits(**converted)


def refuse_options_of_validation(config: Config, recipe: Recipe) -> None:
    """Raise ValueError for options that have no effect on a run without a validation split."""
    given = {
        "eval.patience": config.eval.patience is not None,
        "checkpoint.best": config.checkpoint.best,
        "schedule.name=plateau": recipe.schedule.name == "plateau",
    }
    for name, on in given.items():
        if on:
            raise ValueError(
                f"{name} has no effect: recipe={config.recipe} has no validation split; "
                "hold one out, or drop it"
            )


def build_strategies(config: Config, recipe: Recipe, world: World) -> dict[str, Strategy]:
    """One strategy for each model of the recipe, set up in the recipe's order; the same weights on every
    rank.
    """
    optimizers = recipe.optimizers()
    strategies: dict[str, Strategy] = {}
    for name, build_model in recipe.models().items():
        strategy = strategy_class(config.strategy)(world, config)
        build = partial(_build_model, build_model, config, name)
        strategy.setup(build, optimizers.get(name), recipe.blocks)
        if name in optimizers:
            for group in strategy.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        strategies[name] = strategy
    return strategies


def _build_model(build_model: Any, config: Config, name: str) -> nn.Module:
    seed_device(config.seed, "weights", name)
    model: nn.Module = build_model()
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def has_blocks(recipe: Recipe) -> bool:
    """Whether any model of `recipe` has `blocks`; the models are built without memory, on the meta device, if
    they can be.
    """
    for build_model in recipe.models().values():
        try:
            with torch.device("meta"):
                model = build_model()
        except Exception:  # whatever a recipe's own code does to a tensor without data
            model = build_model()
        if any(True for _ in recipe.blocks(model)):
            return True
    return False
