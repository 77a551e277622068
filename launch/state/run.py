"""A run made ready: models under their strategies, data cut for this rank, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from launch.cli.config import Config
from launch.cli.resolve import Settings, accumulation_steps
from launch.data import loader as data
from launch.data.in_memory import as_in_memory, to_device_if_small
from launch.runtime.collectives import all_reduce_sum
from launch.runtime.phase import Phase
from launch.runtime.seeding import seed_device
from launch.runtime.world import World
from launch.state.batchnorm import RunningStatistics
from recipes.base import Recipe
from recipes.parts.data import Batch, Dataset, InMemoryDataset, Splits
from recipes.parts.schedule import Plateau, Schedule
from strategies import strategy_class
from strategies.base import Strategy
from strategies.precision import set_matmul_precision


@dataclass
class TrainState:
    """How far a run has come; with the strategies' state, all that a checkpoint holds."""

    step: int = 0
    """optimizer steps done"""
    best: float | None = None
    """best objective of any evaluation so far"""
    best_step: int | None = None
    bad_evaluations: int = 0
    """evaluations since the best one"""
    unevaluated: bool = False
    """whether the evaluation at this step was cut off by a stop, and is still to be made"""
    plateau: Plateau = field(default_factory=Schedule().plateau)

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {**vars(self), "plateau": self.plateau.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.plateau.load_state(state["plateau"])
        vars(self).update({name: value for name, value in state.items() if name != "plateau"})

    def observe(self, scores: Mapping[str, Any], run: Run) -> None:
        """Take note of an evaluation: is the recipe's objective better than ever, and by enough?"""
        value, mode = float(scores[run.recipe.monitor]), run.recipe.monitor_mode
        gain = 0.0 if self.best is None else value - self.best if mode == "max" else self.best - value
        if self.best is None or gain > run.config.eval.min_delta:
            self.best, self.best_step, self.bad_evaluations = value, self.step, 0
        else:
            self.bad_evaluations += 1
        self.plateau.observe(value, mode)


@dataclass(kw_only=True)
class Run:
    """Everything that the loop needs; built by `prepare`."""

    config: Config
    recipe: Recipe
    world: World
    splits: Splits
    batch_plan: data.BatchPlan
    total_steps: int
    """the length of the run: what schedules stretch over"""
    strategies: dict[str, Strategy]
    statistics: RunningStatistics
    progress: TrainState
    phase: Phase = field(default_factory=Phase)
    eval_loaders: dict[int, tuple[data.Loader, data.EvalSampler]] = field(default_factory=dict)
    """by data set: their processes, if any, last from one evaluation to the next"""
    stop_at: int | None = None
    """a step to end at before the run's full length (debug mode)"""

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by name, as the recipe calls them."""
        return {name: strategy.model for name, strategy in self.strategies.items()}

    @property
    def sync_every_step(self) -> bool:
        """Look at each loss before its step is made: where that is free (one process on a CPU), or asked for,
        or needed anyway.

        Elsewhere it would cost each step a wait for the device and a reduction over the ranks.
        """
        free = self.world.device == "cpu" and self.world.world_size == 1
        return free or self.recipe.skip_nonfinite or bool(self.config.debug) or self.config.log.every == 1

    @property
    def last_step(self) -> int:
        """The step after which training ends."""
        return self.total_steps if self.stop_at is None else min(self.stop_at, self.total_steps)

    def reduced_losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean losses over the global batch, from what `train_step` returned on each rank."""
        return {
            name: loss if self.sync_every_step else all_reduce_sum(loss.clone())
            for name, loss in losses.items()
        }

    @property
    def stopping_early(self) -> bool:
        """Whether the objective has not become better for `eval.patience` evaluations."""
        patience = self.config.eval.patience
        return patience is not None and self.progress.bad_evaluations >= patience

    def due(self, every: int | None) -> bool:
        """Whether something is to be done after this step: each `every` steps, or each epoch, and at the end."""
        step, size = self.progress.step, len(self.splits.train)
        if step == self.last_step:
            return True
        if every is not None:
            return step % every == 0
        return step * self.batch_plan.batch_size // size > (step - 1) * self.batch_plan.batch_size // size

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.progress.step * self.batch_plan.batch_size / len(self.splits.train)

    @property
    def checkpoint_due(self) -> bool:
        """Whether to save after this step: by `checkpoint.every`, at the end, and the best if it is to be
        kept.
        """
        best = self.config.checkpoint.best and self.progress.best_step == self.progress.step
        return best or self.stopping_early or self.due(self.config.checkpoint.every)

    def train_steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step to come, on its device."""
        steps = data.group_micro_batches(self.train_loader(), self.batch_plan.accumulation_steps)
        return data.prefetch(steps, self.world.device, self.recipe.channels_last)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device, in the layout of the recipe."""
        return data.to_device(batch, self.world.device, self.recipe.channels_last)

    def train_loader(self) -> data.Loader:
        """This rank's micro-batches from the next step to the last."""
        sampler = data.TrainSampler(
            len(self.splits.train), self.batch_plan, self.config.seed, self.progress.step, self.last_step
        )
        return data.loader(
            self.splits.train, sampler, self.config.seed, "train", self.workers(self.splits.train), self.world
        )

    def eval_loader(self, dataset: Dataset) -> tuple[data.Loader, data.EvalSampler]:
        """Each sample of `dataset` once, over all ranks, and the sampler that knows which micro-batches
        count.
        """
        if id(dataset) not in self.eval_loaders:
            sampler = data.EvalSampler(
                len(dataset), self.batch_plan.micro_batch_size, self.world.rank, self.world.world_size
            )
            many = self.workers(dataset)
            self.eval_loaders[id(dataset)] = (
                data.loader(dataset, sampler, self.config.seed, "eval", many, self.world, persistent=True),
                sampler,
            )
        return self.eval_loaders[id(dataset)]

    def workers(self, dataset: Dataset) -> int:
        """Processes of this rank that load from `dataset`."""
        if self.config.workers is not None:
            return self.config.workers
        return 0 if isinstance(dataset, InMemoryDataset) else data.default_workers(self.world)


def prepare(settings: Settings, world: World, phase: Phase | None = None) -> Run:
    """Build data and models. ValueError and FileNotFoundError are the user's to read (an empty data set, a
    bad option).
    """
    config, recipe = settings.config, settings.recipe
    set_matmul_precision(config.precision)
    if config.precision == "tf32" and world.device == "cpu":
        raise ValueError("precision=tf32 has no effect on a CPU; use fp32 or bf16")
    if config.sync_batchnorm and world.device == "cpu":
        raise ValueError(
            "sync_batchnorm=true needs CUDA; on a CPU a fixed micro_batch_size keeps BatchNorm independent of ranks"
        )
    splits = in_memory(recipe.build_data(), world, config.workers)
    for name, split in vars(splits).items():
        if split is not None and len(split) == 0:
            raise ValueError(f"the {name} split of recipe={config.recipe} is empty")
    if splits.val is None:
        refuse_without_validation(config, recipe)
    many = accumulation_steps(config, world)
    micro = config.batch_size // (many * world.world_size)
    batch_plan = data.BatchPlan(
        micro_batch_size=micro, accumulation_steps=many, rank=world.rank, world_size=world.world_size
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


def in_memory(splits: Splits, world: World, workers: int | None) -> Splits:
    """The splits, those that lie in memory as such; the training data on the GPU, if small and no processes
    are asked for.
    """
    found = {name: as_in_memory(split) or split for name, split in vars(splits).items()}
    if isinstance(found["train"], InMemoryDataset) and not workers:
        found["train"] = to_device_if_small(found["train"], world.device)
    return Splits(**found)


def refuse_without_validation(config: Config, recipe: Recipe) -> None:
    """Raise ValueError for what has no effect on a run that has no validation split."""
    given = {
        "eval.patience": config.eval.patience is not None,
        "checkpoint.best": config.checkpoint.best,
        "schedule.name=plateau": recipe.schedule.name == "plateau",
    }
    for name, on in given.items():
        if on:
            raise ValueError(
                f"{name} has no effect: recipe={config.recipe} has no validation split; hold one out, or drop it"
            )


def build_strategies(config: Config, recipe: Recipe, world: World) -> dict[str, Strategy]:
    """One strategy for each model of the recipe, set up in the recipe's order; the same weights on every
    rank.
    """
    optimizers = recipe.optimizers()
    strategies: dict[str, Strategy] = {}
    for name, build_model in recipe.models().items():
        strategy = strategy_class(config.strategy)(world, config)
        build = partial(_seeded_model, build_model, config, name)
        strategy.setup(build, optimizers.get(name), recipe.blocks)
        if name in optimizers:
            for group in strategy.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        strategies[name] = strategy
    return strategies


def _seeded_model(build_model: Any, config: Config, name: str) -> nn.Module:
    seed_device(config.seed, "weights", name)
    model: nn.Module = build_model()
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model
