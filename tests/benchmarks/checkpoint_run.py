"""What the benchmarks of checkpoints share: a run with a state of a given size, lines of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from launch.state.run import Run
from launch.training.loop import between_steps, save, set_learning_rate, train_step
from tests.benchmarks.dense_run import Dense
from tests.launch.runs import LoopParts

WIDTH = 2048


def say(what: str, value: str, aim: str = "") -> None:
    """One line of the table."""
    print(f"{what:<68}{value:>22}   {aim}".rstrip(), flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def dense(state_mb: float) -> Dense:
    """A recipe whose state has about that size."""
    return Dense(width=WIDTH, layers=max(round(state_mb * 1e6 / (12 * WIDTH**2)), 1), adam=True, samples=8)


def steps(run: Run, parts: LoopParts) -> Iterator[None]:
    """The body of `launch.training.loop.train`, on the same batch again and again."""
    metrics, checkpoints, requests = parts
    width = next(iter(run.strategies["model"].module.parameters())).shape[1]
    batch = run.to_device(
        [torch.randn(run.batch_plan.batch_size, width), torch.randn(run.batch_plan.batch_size, width)]
    )
    while True:
        lr = set_learning_rate(run)
        losses, norms = train_step(run, [batch])
        run.progress.step += 1
        metrics.step(losses, norms, lr)
        between_steps(run, metrics, checkpoints)
        requests.exchange()
        if run.checkpoint_due or requests.save:
            save(run, metrics, checkpoints, requests)
        yield


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of paired ratios."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f} x"
