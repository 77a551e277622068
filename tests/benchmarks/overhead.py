"""What the loop costs over a hand-written one, in one process, on the same batches, interleaved A B B A.

    OMP_NUM_THREADS=1 python tests/benchmarks/overhead.py

Prints the median step time of both and the median of paired differences. The raw loop does what a careful person writes: forward,
backward, clip-free gradient norm, step, loss read once in ten steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.job import Job
from launch.loop import set_learning_rate, train_step
from launch.record import Record
from recipes.base import Batch
from tests.benchmarks.workload import Dense, prepared

ROUNDS, STEPS = 40, 50


def raw_steps(recipe: Dense, batch: Batch) -> Iterator[None]:
    """The hand-written loop."""
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    samples, step = len(batch[0]), 0
    while True:
        loss = recipe.loss(model, batch) / samples
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            loss.item(), norm.item()
        yield


def rankzero_steps(job: Job, record: Record, batch: Batch) -> Iterator[None]:
    """The body of `launch.loop.train`."""
    while True:
        rate = set_learning_rate(job)
        losses, norms = train_step(job, [batch])
        job.progress.step += 1
        record.step(losses, norms, rate)
        yield


def seconds(steps: Iterator[None]) -> float:
    """Seconds a step, over `STEPS`."""
    start = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return (time.perf_counter() - start) / STEPS


def measure(name: str, recipe: Dense, rounds: int) -> None:
    """One row."""
    batch = [torch.randn(recipe.samples, recipe.width), torch.randn(recipe.samples, recipe.width)]
    with prepared(recipe) as (job, record):
        ours, raw = rankzero_steps(job, record, batch), raw_steps(recipe, batch)
        seconds(raw), seconds(ours)  # warm up
        pairs = []
        for _ in range(rounds):
            a, b, c, d = seconds(raw), seconds(ours), seconds(ours), seconds(raw)
            pairs += [(a, b), (d, c)]
    extra = statistics.median(b - a for a, b in pairs)
    ratio = statistics.median(b / a for a, b in pairs)
    spread = statistics.quantiles([b / a for a, b in pairs], n=4)
    middle = statistics.median(a for a, _ in pairs)
    print(f"{name:<14}{middle * 1e3:>10.3f} ms{extra * 1e6:>12.0f} us{ratio:>9.3f}   {spread[0]:.3f} to {spread[2]:.3f}")


def main() -> None:
    """The table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'workload':<14}{'raw step':>13}{'extra':>15}{'ratio':>9}   quartiles of the ratio")
    measure("empty step", Dense(), ROUNDS)
    measure("20 ms step", Dense(width=448, layers=12, samples=64), ROUNDS // 4)


if __name__ == "__main__":
    main()
