"""The loop. It reads like the textbook's, and knows of no backend, launcher or file format."""

from __future__ import annotations

import gc
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launch.runtime.collectives import AsyncSum, all_reduce_sum
from launch.runtime.seeding import seed_device
from launch.watchdog.nonfinite import check_gradients, check_loss
from recipes.base import local_num_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchmetrics import Metric

    from launch.reporting.metrics import Metrics
    from launch.state.run import Run
    from recipes.parts.data import Batch, Dataset
    from strategies.base import Strategy


def train(run: Run, metrics: Metrics) -> str:
    """Train from where `run.progress` stands to the end, recording, evaluating and saving on the way.

    Returns why it has stopped before the end; empty if it has not.
    """
    if run.progress.unevaluated:
        validate(run, metrics)
    if run.stopping_early or "stop" in metrics.wanted:
        return metrics.why_stopped
    with manual_gc():
        for batches in metrics.throughput.watch(run.train_steps()):
            rate = set_learning_rate(run)
            losses, norms = train_step(run, batches)
            run.progress.step += 1
            metrics.step(losses, norms, rate)
            if run.splits.val is not None and run.due(run.config.eval.every):
                validate(run, metrics)
            metrics.agree()
            if run.checkpoint_due or metrics.wanted:
                metrics.checkpoint()
            if run.stopping_early or "stop" in metrics.wanted:
                break
            run.phase.enter("data")
    return metrics.why_stopped


def validate(run: Run, metrics: Metrics) -> None:
    """Evaluate, and take note; if a stop cuts it off, it is made in the next life of the run."""
    assert run.splits.val is not None
    metrics.flush()
    run.progress.unevaluated = True
    if (scores := evaluate(run, run.splits.val, metrics.stopping)) is None:
        return
    run.progress.unevaluated = False
    metrics.evaluation(scores)
    run.progress.observe(scores, run)


def train_step(run: Run, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimizer step of each trained model, on `batches` on its device. Returns the mean loss and the
    gradient norm of each.

    The loss is this rank's share of the mean over the global batch (under `run.sync_every_step` the mean
    itself).
    """
    run.phase.step, run.phase.batches = run.progress.step + 1, batches
    items = global_num_items(run, batches)  # an all-reduce, under way while forward runs
    losses: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for name, loss_function in run.recipe.losses().items():
        trained = run.strategies[name]
        loss_sum = torch.zeros((), dtype=torch.float64, device=run.world.device)
        for micro_step, batch in enumerate(batches):
            seed_device(
                run.config.seed, "step", run.progress.step, name, run.batch_plan.micro_batch_index(micro_step)
            )
            run.statistics.set_momentum(micro_step, run.batch_plan.accumulation_steps)
            with (
                others_frozen(run, trained),
                trained.micro_batch(last=micro_step == run.batch_plan.accumulation_steps - 1),
            ):
                run.phase.enter("forward")
                loss = loss_function(run.models, batch)
                run.phase.enter("backward")
                num_items = items.wait()
                if run.before_backward is not None:
                    run.before_backward(loss)
                trained.backward(loss / num_items)
            loss_sum += loss.detach()
        losses[name] = loss_sum / num_items
        if run.sync_every_step and not check_loss(run, name, all_reduce_sum(losses[name]), batches):
            trained.step(apply=False)
            continue
        run.phase.enter("step")
        norms[name] = trained.step()
        if run.sync_every_step:
            check_gradients(run, name, norms[name])
    return losses, norms


@torch.no_grad()
def evaluate(
    run: Run, dataset: Dataset, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """The mean loss and the recipe's metrics over `dataset`, each sample counted once, on any number of
    ranks.

    None if `should_stop`, which all ranks ask after each batch, says so.
    """
    run.phase.enter("evaluate")
    loader, sampler = run.eval_loader(dataset)
    run.statistics.synchronize(run.world)
    # sums in float64: the order in which ranks add up then no longer shows in the result
    metrics = {
        name: metric.to(run.world.device).set_dtype(torch.float64)
        for name, metric in run.recipe.metrics().items()
    }
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=run.world.device)
    with evaluating(run):
        for micro_step, batch in enumerate(loader):
            run.phase.enter("evaluate")
            if should_stop():
                return None
            batch = run.to_device(batch)
            run.phase.batches = [batch]  # for a verdict; and those of training are let go
            seed_device(run.config.seed, "eval", run.batch_plan.rank + micro_step * run.batch_plan.world_size)
            with next(iter(run.strategies.values())).inference():
                losses, outcome = run.recipe.eval_step_models(run.models, batch)
            if not sampler.counts(micro_step):
                continue
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.double()
            count += local_num_items(run.recipe, batch)
            if outcome is not None:
                for metric in metrics.values():
                    metric.update(*outcome)
    all_reduce_sum(count)
    means = {
        name: float(all_reduce_sum(sums.get(name, torch.zeros_like(count))) / count)
        for name in run.recipe.losses()
    }
    return {
        "loss": sum(means.values()),
        **({f"loss/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}),
        **{name: computed(metric) for name, metric in metrics.items()},
    }


def computed(metric: Metric) -> Any:
    """A metric over all ranks, as plain numbers. That some ranks had no sample of their own is nothing to
    warn about.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        return metric.compute().float().tolist()


@contextmanager
def manual_gc() -> Iterator[None]:
    """Without Python's garbage collector, which would stop one rank in the midst of a step while the others
    wait for it.

    The record collects between steps, on all ranks at the same ones.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """The models in evaluation mode; then those that are trained in training mode again, a fixed teacher not.

    Python's garbage collector works again meanwhile: an evaluation may be long, and nobody collects in it by
    hand.
    """
    for model in run.models.values():
        model.eval()
    frozen = not gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if frozen:
            gc.disable()
        for name in run.recipe.losses():
            run.models[name].train()


@contextmanager
def others_frozen(run: Run, trained: Strategy) -> Iterator[None]:
    """While one model of several is trained, the others are called but take no gradient."""
    with ExitStack() as stack:
        for strategy in run.strategies.values():
            if strategy is not trained:
                stack.enter_context(strategy.frozen())
        yield


def global_num_items(run: Run, batches: list[Batch]) -> NumItems:
    """Start to count what the losses of this step sum over, on all ranks and micro-batches.

    Collective where the recipe counts items in each batch; the all-reduce runs while forward does.
    """
    counts = [count for batch in batches if (count := run.recipe.num_items(batch)) is not None]
    if not counts:  # the same for each sample, and a global batch is always full
        return NumItems(run.batch_plan.batch_size * run.recipe.items_per_sample())
    if len(counts) < len(batches):
        raise ValueError(
            f"{type(run.recipe).__name__}.num_items gave a number for one batch and None for another; "
            "give a number for each, or None for all"
        )
    local = sum(counts)
    if run.world.world_size == 1 and not isinstance(local, Tensor):
        return NumItems(max(local, 1))
    total = torch.zeros((), dtype=torch.float64, device=run.world.device) + local
    return NumItems(AsyncSum(total))


class NumItems:
    """The number of items in a global batch: known, or an all-reduce under way."""

    def __init__(self, value: int | AsyncSum) -> None:
        self.value = value

    def wait(self) -> int | Tensor:
        """The number; waits for the all-reduce."""
        return self.value if isinstance(self.value, int) else self.value.wait().clamp(min=1)


def set_learning_rate(run: Run) -> float:
    """Give each parameter group its learning rate for the coming step; returns that of the first group."""
    factor = run.recipe.schedule.factor(run.progress.step, run.total_steps) * run.progress.plateau.scale
    groups = [g for name in run.recipe.losses() for g in run.strategies[name].optimizer.param_groups]
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return float(groups[0]["lr"])
