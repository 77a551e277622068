"""The loop. It reads like the textbook's, and knows of no backend, launcher or file format."""

from __future__ import annotations

import gc
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launch.runtime.collectives import Total, total
from launch.runtime.seeding import seed_device
from launch.watchdog.nonfinite import check_gradients, check_loss
from recipes.base import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchmetrics import Metric

    from launch.reporting.metrics import Record
    from launch.state.run import Job
    from recipes.parts.data import Batch, Dataset
    from strategies.base import Strategy


def train(job: Job, record: Record) -> str:
    """Train from where `job.progress` stands to the end, recording, evaluating and saving on the way.

    Returns why it has stopped before the end; empty if it has not.
    """
    if job.progress.unevaluated:
        look(job, record)
    if job.stopping_early or "stop" in record.wanted:
        return record.why_stopped
    with collected_by_hand():
        for batches in record.throughput.watch(job.train_steps()):
            rate = set_learning_rate(job)
            losses, norms = train_step(job, batches)
            job.progress.step += 1
            record.step(losses, norms, rate)
            if job.splits.val is not None and job.due(job.config.eval.every):
                look(job, record)
            record.agree()
            if job.checkpoint_due or record.wanted:
                record.checkpoint()
            if job.stopping_early or "stop" in record.wanted:
                break
            job.place.at("data")
    return record.why_stopped


def look(job: Job, record: Record) -> None:
    """Evaluate, and take note; if a stop cuts it off, it is made in the next life of the run."""
    assert job.splits.val is not None
    record.flush()
    job.progress.unevaluated = True
    if (scores := evaluate(job, job.splits.val, record.stopping)) is None:
        return
    job.progress.unevaluated = False
    record.evaluation(scores)
    job.progress.observe(scores, job)


def train_step(job: Job, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimizer step of each trained model, on `batches` on its device. Returns the mean loss and the gradient norm of each.

    The loss is this rank's share of the mean over the global batch (under `job.careful` the mean itself).
    """
    job.place.step, job.place.batches = job.progress.step + 1, batches
    counted = global_count(job, batches)
    losses: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for name, loss_function in job.recipe.losses().items():
        trained = job.strategies[name]
        loss_sum = torch.zeros((), dtype=torch.float64, device=job.world.device)
        for turn, batch in enumerate(batches):
            seed_device(job.config.seed, "step", job.progress.step, name, job.cut.position(turn))
            job.statistics.share(turn, job.cut.accumulation)
            with others_resting(job, trained), trained.microbatch(last=turn == job.cut.accumulation - 1):
                job.place.at("forward")
                loss = loss_function(job.models, batch)
                job.place.at("backward")
                trained.backward(loss / counted())
            loss_sum += loss.detach()
        losses[name] = loss_sum / counted()
        if job.careful and not check_loss(job, name, total(losses[name]), batches):
            trained.discard()
            continue
        job.place.at("step")
        norms[name] = trained.step()
        if job.careful:
            check_gradients(job, name, norms[name])
    return losses, norms


@torch.no_grad()
def evaluate(job: Job, dataset: Dataset, cut_off: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """The mean loss and the recipe's metrics over `dataset`, each sample counted once, on any number of ranks.

    None if `cut_off`, which all ranks ask after each batch, says so.
    """
    job.place.at("evaluate")
    loader, sampler = job.eval_loader(dataset)
    job.statistics.synchronise(job.world)
    # sums in float64: the order in which ranks add up then no longer shows in the result
    metrics = {name: metric.to(job.world.device).set_dtype(torch.float64) for name, metric in job.recipe.metrics().items()}
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=job.world.device)
    with evaluating(job):
        for turn, batch in enumerate(loader):
            job.place.at("evaluate")
            if cut_off():
                return None
            batch = job.to_device(batch)
            job.place.batches = [batch]  # for a verdict; and those of training are let go
            seed_device(job.config.seed, "eval", job.cut.rank + turn * job.cut.world_size)
            with next(iter(job.strategies.values())).autocast():
                losses, outcome = job.recipe.score(job.models, batch)
            if not sampler.counts(turn):
                continue
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.double()
            count += job.recipe.count(batch)
            if outcome is not None:
                for metric in metrics.values():
                    metric.update(*outcome)
    total(count)
    means = {name: float(total(sums.get(name, torch.zeros_like(count))) / count) for name in job.recipe.losses()}
    return {
        "loss": sum(means.values()),
        **({f"loss/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}),
        **{name: computed(metric) for name, metric in metrics.items()},
    }


def computed(metric: Metric) -> Any:
    """A metric over all ranks, as plain numbers. That some ranks had no sample of their own is nothing to warn about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        return metric.compute().float().tolist()


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Without Python's garbage collector, which would stop one rank in the midst of a step while the others wait for it.

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
def evaluating(job: Job) -> Iterator[None]:
    """The models in evaluation mode; then those that are trained in training mode again, a fixed teacher not.

    Python's garbage collector works again meanwhile: an evaluation may be long, and nobody collects in it by hand.
    """
    for model in job.models.values():
        model.eval()
    resting = not gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if resting:
            gc.disable()
        for name in job.recipe.losses():
            job.models[name].train()


@contextmanager
def others_resting(job: Job, trained: Strategy) -> Iterator[None]:
    """While one model of several is trained, the others are called but take no gradient."""
    with ExitStack() as stack:
        for strategy in job.strategies.values():
            if strategy is not trained:
                stack.enter_context(strategy.resting())
        yield


def global_count(job: Job, batches: list[Batch]) -> Callable[[], int | Tensor]:
    """What the losses of this step sum over, on all ranks and micro-batches: on its way now, to be asked for after forward."""
    if type(job.recipe).count is Recipe.count:
        known = job.cut.batch_size * job.recipe.count_per_sample()  # a global batch is always full
        return lambda: known
    here = sum(job.recipe.count(batch) for batch in batches)
    if job.world.world_size == 1 and not isinstance(here, Tensor):
        return lambda: max(here, 1)
    coming = Total(torch.zeros((), dtype=torch.float64, device=job.world.device) + here)
    return lambda: coming.get().clamp(min=1)


def set_learning_rate(job: Job) -> float:
    """Give each parameter group its learning rate for the coming step; returns that of the first group."""
    factor = job.recipe.schedule.factor(job.progress.step, job.total_steps) * job.progress.plateau.scale
    groups = [g for name in job.recipe.losses() for g in job.strategies[name].optimizer.param_groups]
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return float(groups[0]["lr"])
