"""Evaluation on a validation or test split: each sample counts once, on any number of ranks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launch.runtime.collectives import all_reduce_sum
from launch.runtime.seeding import seed_device
from recipes.base import local_num_items

if TYPE_CHECKING:
    from torchmetrics import Metric

    from launch.state.run import Run
    from launch.training.stop_and_save import Requests
    from recipes.parts.data import Dataset


@torch.no_grad()
def evaluate(run: Run, dataset: Dataset, requests: Requests | None = None) -> dict[str, Any] | None:
    """The mean loss and the recipe's metrics over `dataset`: {"loss": ..., "accuracy": ...}.

    None if the ranks agree to stop meanwhile, which they ask in `requests` before each batch. Collective.
    """
    run.phase.enter("evaluate")
    loader, sampler = run.eval_loader(dataset)
    run.statistics.synchronize(run.world)
    # float64: the order in which ranks add up then no longer shows in the result
    metrics = {
        name: metric.to(run.world.device).set_dtype(torch.float64)
        for name, metric in run.recipe.metrics().items()
    }
    loss_sums: dict[str, Tensor] = {}
    num_items = torch.zeros((), dtype=torch.float64, device=run.world.device)
    with evaluation_mode(run):
        for step, batch in enumerate(loader):
            run.phase.enter("evaluate")
            if requests is not None:
                requests.exchange(every_call=True)
                if requests.stop:
                    return None
            batch = run.to_device(batch)
            run.phase.batches = [batch]  # for a failure report; and those of training are freed
            seed_device(run.config.seed, "eval", run.batch_plan.rank + step * run.batch_plan.world_size)
            with next(iter(run.strategies.values())).inference():
                losses, outputs = run.recipe.eval_step_models(run.models, batch)
            if not sampler.counts(step):
                continue
            for name, loss in losses.items():
                loss_sums[name] = loss_sums.get(name, 0) + loss.double()
            num_items += local_num_items(run.recipe, batch)
            if outputs is not None:
                for metric in metrics.values():
                    metric.update(*outputs)
    all_reduce_sum(num_items)
    means = {
        name: float(all_reduce_sum(loss_sums.get(name, torch.zeros_like(num_items))) / num_items)
        for name in run.recipe.losses()
    }
    scores: dict[str, Any] = {"loss": sum(means.values())}
    if len(means) > 1:
        scores |= {f"loss/{name}": mean for name, mean in means.items()}
    return scores | {name: compute(metric) for name, metric in metrics.items()}


def compute(metric: Metric) -> Any:
    """A metric over all ranks, as plain numbers. That some ranks had no sample of their own is nothing to
    warn about. Collective.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        return metric.compute().float().tolist()


@contextmanager
def evaluation_mode(run: Run) -> Iterator[None]:
    """The models in evaluation mode, and afterwards those that are trained in training mode again; a fixed
    teacher stays in evaluation mode.

    Python's garbage collector works meanwhile: an evaluation may be long, and nothing is collected by hand
    in it.
    """
    for model in run.models.values():
        model.eval()
    was_disabled = not gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if was_disabled:
            gc.disable()
        for name in run.recipe.losses():
            run.models[name].train()
