"""A run made ready: models under their strategies, data cut for this rank, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from launch.cli.config import Config
from launch.data.batch import to_device
from launch.data.batch_plan import BatchPlan
from launch.data.loader import Loader, build_loader, default_workers
from launch.data.prefetch import group_micro_batches, prefetch
from launch.data.sampler import EvalSampler, TrainSampler
from launch.runtime.collectives import all_reduce_sum
from launch.runtime.phase import Phase
from launch.runtime.world import World
from launch.state.batchnorm import RunningStatistics
from launch.state.progress import TrainState
from recipes.base import Recipe
from recipes.parts.data import Batch, Dataset, InMemoryDataset, Splits
from strategies.base import Strategy


@dataclass(kw_only=True)
class Run:
    """Everything that the loop needs; built by `prepare`."""

    config: Config
    recipe: Recipe
    world: World
    splits: Splits
    batch_plan: BatchPlan
    total_steps: int
    """the length of the run: what schedules stretch over"""
    strategies: dict[str, Strategy]
    statistics: RunningStatistics
    progress: TrainState
    phase: Phase = field(default_factory=Phase)
    eval_loaders: dict[int, tuple[Loader, EvalSampler]] = field(default_factory=dict)
    """by data set: their processes, if any, last from one evaluation to the next"""
    stop_at: int | None = None
    """a step to end at before the run's full length (debug mode)"""
    backward_context: Callable[[Tensor], AbstractContextManager[object]] = nullcontext
    """called with the loss of each micro-batch; its backward pass is made within (debug mode)"""

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by name, as the recipe calls them."""
        return {name: strategy.model for name, strategy in self.strategies.items()}

    @property
    def sync_every_step(self) -> bool:
        """Whether to read each loss on the host before its optimizer step: where that is free (one process on
        a CPU), asked for, or needed anyway.

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
        """Early stopping: whether the monitored metric has not improved for `eval.patience` evaluations."""
        patience = self.config.eval.patience
        return patience is not None and self.progress.bad_evaluations >= patience

    def due(self, every: int | None) -> bool:
        """Whether something is to be done after this step: every `every` steps (None: every epoch), and at
        the end.
        """
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

    @property
    def eval_due(self) -> bool:
        """Whether to validate after this step: by `eval.every`, and at the end."""
        return self.splits.val is not None and self.due(self.config.eval.every)

    @property
    def log_due(self) -> bool:
        """Whether to log after this step: by `log.every`, and at the end."""
        return self.progress.step % self.config.log.every == 0 or self.progress.step == self.last_step

    def train_steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step to come, on its device."""
        steps = group_micro_batches(self.train_loader(), self.batch_plan.accumulation_steps)
        return prefetch(steps, self.world.device, self.recipe.channels_last)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device, in the memory format of the recipe."""
        return to_device(batch, self.world.device, self.recipe.channels_last)

    def train_loader(self) -> Loader:
        """This rank's micro-batches from the next step to the last."""
        sampler = TrainSampler(
            len(self.splits.train), self.batch_plan, self.config.seed, self.progress.step, self.last_step
        )
        workers = self.num_workers(self.splits.train)
        return build_loader(self.splits.train, sampler, self.config.seed, "train", workers, self.world)

    def eval_loader(self, dataset: Dataset) -> tuple[Loader, EvalSampler]:
        """A loader of each sample of `dataset` once, over all ranks, and its sampler, which knows the
        micro-batches that count.
        """
        if id(dataset) not in self.eval_loaders:
            sampler = EvalSampler(
                len(dataset), self.batch_plan.micro_batch_size, self.world.rank, self.world.world_size
            )
            workers = self.num_workers(dataset)
            self.eval_loaders[id(dataset)] = (
                build_loader(
                    dataset, sampler, self.config.seed, "eval", workers, self.world, persistent=True
                ),
                sampler,
            )
        return self.eval_loaders[id(dataset)]

    def num_workers(self, dataset: Dataset) -> int:
        """Worker processes of this rank that load from `dataset`."""
        if self.config.workers is not None:
            return self.config.workers
        return 0 if isinstance(dataset, InMemoryDataset) else default_workers(self.world)
