"""What a run leaves behind while it goes on: metrics.jsonl, lines on the screen, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch import checkpoint, nonfinite
from launch.job import Job
from launch.screen import Screen
from launch.world import total


@dataclass
class Pending:
    """A step whose numbers are still on the device."""

    step: int
    epoch: float
    losses: dict[str, Tensor]
    norms: dict[str, Tensor]
    rate: float


class Record:
    """The record of a run. Every rank has one, rank zero's writes.

    Numbers stay on the device until `log.every` steps have come together and are then read at once: each line is exact, and
    the device is waited for once an interval. A job that is `careful` has already looked at each loss, so it reads at once.
    """

    def __init__(self, job: Job, run_dir: Path, versions: Mapping[str, str], screen: Screen) -> None:
        self.job, self.run_dir, self.versions, self.screen = job, run_dir, versions, screen
        self.pending: list[Pending] = []
        self.started = self.clock = time.perf_counter()
        self.first_step = job.progress.step
        self.scores: dict[str, Any] = {}
        if job.world.rank == 0:
            forget_after(run_dir / "metrics.jsonl", job.progress.step)
            self.file = (run_dir / "metrics.jsonl").open("a")

    def step(self, losses: dict[str, Tensor], norms: dict[str, Tensor], rate: float) -> None:
        """Take note of a step that has been made."""
        progress = self.job.progress
        self.pending.append(Pending(progress.step, self.job.epoch, losses, norms, rate))
        shown = progress.step % self.job.config.log.every == 0 or progress.step == self.job.last_step
        if shown:
            self.flush()

    def flush(self) -> None:
        """Read the pending steps from the device and write them."""
        if not self.pending:
            return
        names = list(self.pending[0].losses)
        losses = read([p.losses[name] for p in self.pending for name in names], over_ranks=not self.job.careful)
        norms = read([p.norms.get(name) for p in self.pending for name in names])
        now = time.perf_counter()
        speed = len(self.pending) * self.job.cut.batch_size / (now - self.clock)
        self.clock = now
        lines: list[dict[str, Any]] = []
        for index, pending in enumerate(self.pending):
            mine = slice(index * len(names), (index + 1) * len(names))
            each = {f"loss/{name}": loss for name, loss in zip(names, losses[mine], strict=True)}
            lines.append(
                {
                    "step": pending.step,
                    "epoch": round(pending.epoch, 6),
                    "samples": pending.step * self.job.cut.batch_size,
                    "loss": sum(losses[mine]),
                    **(each if len(names) > 1 else {}),
                    "lr": pending.rate,
                    "grad_norm": math.hypot(*norms[mine]),
                    "samples_per_second": round(speed, 1),
                    "time": round(time.time(), 3),
                }
            )
        self.pending.clear()
        self.write(lines)
        self.screen.step(lines[-1], self.job.last_step)
        for line in lines:
            nonfinite.check_late(self.job, line["step"], line["loss"])

    def evaluation(self, scores: dict[str, Any], split: str = "eval") -> None:
        """Take note of an evaluation; numbers go to the screen, tables (a confusion matrix) to the file only."""
        self.flush()
        line = {f"{split}/{name}": value for name, value in scores.items()}
        self.scores.update(line)
        self.write([{"step": self.job.progress.step, **line}])
        self.screen.evaluation(self.job.progress.step, line)
        self.clock = time.perf_counter()

    def checkpoint(self) -> None:
        """Save a checkpoint."""
        self.flush()
        checkpoint.save(self.job, self.run_dir, self.versions)
        self.clock = time.perf_counter()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl. Floats are written with `repr`: two runs can be compared bit by bit."""
        if self.job.world.rank == 0:
            self.file.write("".join(json.dumps(line) + "\n" for line in lines))
            self.file.flush()

    def close(self) -> None:
        """The closing summary."""
        self.flush()
        if self.job.world.rank == 0:
            self.file.close()
        self.screen.summary(self.job, self.first_step, time.perf_counter() - self.started, self.scores, self.run_dir)


def read(values: list[Tensor | None], over_ranks: bool = False) -> list[float]:
    """Scalars from the device as float32 numbers, in one copy, summed over ranks if so asked. NaN for a missing one."""
    if any(value is None for value in values):
        values = [torch.tensor(math.nan) if value is None else value.cpu() for value in values]
    packed = torch.stack([value for value in values if value is not None])
    numbers: list[float] = (total(packed) if over_ranks else packed).float().tolist()
    return numbers


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a killed run made after its last checkpoint: they are made again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # the line that was being written
            break
    metrics.write_text("".join(kept))
