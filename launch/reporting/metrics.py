"""What a run reports while it trains: metrics.jsonl and lines on the console (a logger)."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from launch.checkpoint.writer import SaveResult
from launch.reporting.console import Console
from launch.reporting.throughput import StartupTimer, StepTimer
from launch.runtime.collectives import AsyncGather
from launch.state.run import Run
from launch.watchdog import nonfinite


@dataclass
class PendingStep:
    """A step whose losses and gradient norms are still on the device."""

    step: int
    epoch: float
    losses: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    lr: float


@dataclass
class InFlight:
    """Steps whose numbers are on their way from the devices of all ranks: each loss of each step, then each
    gradient norm.
    """

    steps: list[PendingStep]
    numbers: AsyncGather


class Metrics:
    """The metrics of a run. Every rank has one, rank zero's writes.

    Losses and norms stay on the device until `log.every` steps have come together. Then they are gathered all
    at once, and read when the next step is under way: each line is exact, and neither a rank nor its device
    waits for another. A run that is `sync_every_step` has read each loss already, so it reads at once.
    """

    def __init__(
        self, run: Run, run_dir: Path, console: Console, startup: StartupTimer | None = None
    ) -> None:
        self.run, self.run_dir, self.console = run, run_dir, console
        self.timer = StepTimer(run, startup)
        self.pending: list[PendingStep] = []
        self.in_flight: InFlight | None = None
        self.first_step = run.progress.step
        self.scores: dict[str, Any] = {}
        self.saves: list[SaveResult] = []
        self.slowest_save_s: float | None = None
        """from the call to the commit, on this rank; None before the first"""
        if run.world.rank == 0:
            truncate_after(run_dir / "metrics.jsonl", run.progress.step)
            self.file = (run_dir / "metrics.jsonl").open("a")

    # training steps -----------------------------------------------------------------------------------------

    def step(self, losses: dict[str, Tensor], grad_norms: dict[str, Tensor], lr: float) -> None:
        """Record the step that has been made. Collective at each `log.every`-th step and the last."""
        self.timer.step()
        self.finish_gather()
        step = self.run.progress.step
        self.pending.append(PendingStep(step, self.run.epoch, losses, grad_norms, lr))
        if self.run.log_due:
            self.start_gather()
            if step == self.run.last_step or self.run.sync_every_step:
                self.finish_gather()

    def flush(self) -> None:
        """Read the pending steps from the devices and write them. Collective."""
        self.finish_gather()
        self.start_gather()
        self.finish_gather()

    def start_gather(self, local: bool = False) -> None:
        """Start to gather the numbers of the pending steps, or with `local` this rank's alone. Collective."""
        if not self.pending:
            return
        names = list(self.pending[0].losses)
        skipped = torch.full((), math.nan, device=self.run.world.device)
        losses = torch.stack([step.losses[name] for step in self.pending for name in names])
        norms = torch.stack([step.grad_norms.get(name, skipped) for step in self.pending for name in names])
        self.in_flight = InFlight(self.pending, AsyncGather(torch.cat([losses, norms.to(losses)]), local))
        self.pending = []

    def finish_gather(self) -> None:
        """Wait for the numbers that are on their way, if any, and write their steps."""
        if self.in_flight is None:
            return
        steps, numbers = self.in_flight.steps, self.in_flight.numbers
        self.in_flight = None
        # [ranks, losses and norms, steps, models]
        gathered = numbers.wait().view(-1, 2, len(steps), len(steps[0].losses))
        local_losses, local_norms = gathered[self.run.world.rank if len(gathered) > 1 else 0]
        # summed rank by rank: a reduction of several numbers adds them in an order that depends on how many
        # there are
        losses = local_losses if self.run.sync_every_step else gathered[:, 0].sum(0)
        self.timer.interval(numbers.when, len(steps))
        losses_of, norms_of = losses.float().tolist(), local_norms.float().tolist()
        lines = [self.line(step, losses_of[i], norms_of[i]) for i, step in enumerate(steps)]
        self.write(lines)
        self.console.step(lines[-1], self.run.last_step)
        for line in lines:
            nonfinite.check_late(self.run, line["step"], line["loss"])

    def line(self, step: PendingStep, losses: list[float], grad_norms: list[float]) -> dict[str, Any]:
        """A line of metrics.jsonl; `losses` and `grad_norms` of each model."""
        speed, item_name = self.timer.samples_per_second, self.run.recipe.item_name
        line = {
            "step": step.step,
            "epoch": round(step.epoch, 6),
            "samples": step.step * self.run.batch_plan.batch_size,
            "loss": sum(losses),
        }
        if len(losses) > 1:
            line |= {f"loss/{name}": loss for name, loss in zip(step.losses, losses, strict=True)}
        line |= {"lr": step.lr, "grad_norm": math.hypot(*grad_norms), "samples_per_second": round(speed, 1)}
        if item_name != "samples":
            line[f"{item_name}_per_second"] = round(speed * self.timer.items_per_sample, 1)
        return {**line, "time": round(time.time(), 3)}

    # validation and checkpoints -----------------------------------------------------------------------------

    def evaluation(self, scores: dict[str, Any], split: str = "eval") -> None:
        """Record an evaluation; single numbers go to the console too, tables (a confusion matrix) to the file
        only. Collective.
        """
        self.flush()
        line = {f"{split}/{name}": value for name, value in scores.items()}
        self.scores.update(line)
        self.write([{"step": self.run.progress.step, **line}])
        self.console.evaluation(self.run.progress.step, line)

    def checkpoint(self, save: SaveResult | None) -> None:
        """Record a save that has ended, if one has. One that failed is a warning: the training goes on."""
        if save is None:
            return
        self.saves.append(save)
        self.slowest_save_s = max(self.slowest_save_s or 0.0, save.blocking_s + save.write_s)
        if save.error:
            self.console.warn(
                f"{failed_save_message(save)} The run goes on, and tries again at the next checkpoint."
            )
            return
        line = {"blocking": round(save.blocking_s, 4), "write": round(save.write_s, 4), "bytes": save.size}
        self.write([{"step": save.step, **{f"checkpoint/{name}": value for name, value in line.items()}}])

    # the file -----------------------------------------------------------------------------------------------

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl, on rank zero. Floats are written with `repr`: two runs can be
        compared bit by bit.
        """
        if self.run.world.rank == 0:
            self.file.write("".join(json.dumps(line) + "\n" for line in lines))
            self.file.flush()

    def abort(self) -> None:
        """After a failure: write what this rank knows, without asking another."""
        if self.run.sync_every_step:  # else the numbers of the last steps are still spread over the ranks
            self.start_gather(local=True)
            self.finish_gather()

    def close(self) -> None:
        """Write what is pending and close the file. Collective."""
        self.flush()
        if self.run.world.rank == 0:
            self.file.close()


def failed_save_message(save: SaveResult) -> str:
    """Why there is no checkpoint."""
    return (
        f"step {save.step} was not saved: {save.error}. A rank writes about {decimal(save.size)}; "
        "earlier checkpoints are untouched."
    )


def truncate_after(metrics: Path, step: int) -> None:
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
