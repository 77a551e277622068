"""What a run leaves behind while it goes on: metrics.jsonl, lines on the screen, checkpoints."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from launch.checkpoint.writer import CheckpointWriter, SaveError, SaveResult
from launch.reporting.console import Console
from launch.reporting.throughput import Start, Throughput
from launch.runtime.collectives import AsyncGather
from launch.state.run import Run
from launch.watchdog import nonfinite
from launch.watchdog.consensus import Consensus
from launch.watchdog.stop import StopRequest


@dataclass
class PendingStep:
    """A step whose numbers are still on the device."""

    step: int
    epoch: float
    losses: dict[str, Tensor]
    norms: dict[str, Tensor]
    rate: float


@dataclass
class InFlight:
    """Steps whose numbers are on their way from the devices of all ranks: each loss of each step, then each
    norm.
    """

    steps: list[PendingStep]
    numbers: AsyncGather


class Metrics:
    """The record of a run. Every rank has one, rank zero's writes.

    Numbers stay on the device until `log.every` steps have come together. Then they are asked for all at
    once, and read when the next step is on its way: each line is exact, and neither a rank nor its device
    waits for another. A job that is
    `sync_every_step` has already looked at each loss, so it reads at once.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        versions: Mapping[str, str],
        console: Console,
        stop: StopRequest | None = None,
        start: Start | None = None,
    ) -> None:
        self.run, self.run_dir, self.versions, self.console = run, run_dir, versions, console
        self.pending: list[PendingStep] = []
        self.asked: InFlight | None = None
        self.started = self.clock = time.perf_counter()
        self.first_step = run.progress.step
        self.throughput, self.start = Throughput(run), start or Start()
        self.speed, self.uncounted = 0.0, 0
        """samples a second when last looked, and pending steps that do not count for it"""
        self.scores: dict[str, Any] = {}
        self.speeds: list[str] = []
        self.checkpoint_writer = CheckpointWriter(run, run_dir, versions)
        self.saves: list[SaveResult] = []
        self.slowest_save: float | None = None
        self.slowest_step = 0.0
        self.stop = StopRequest() if stop is None else stop
        self.consensus = Consensus(run.world, ["save", "stop"])
        self.wanted: set[str] = set()
        if run.world.rank == 0:
            truncate_after(run_dir / "metrics.jsonl", run.progress.step)
            self.file = (run_dir / "metrics.jsonl").open("a")

    def step(self, losses: dict[str, Tensor], norms: dict[str, Tensor], rate: float) -> None:
        """Take note of a step that has been made."""
        progress = self.run.progress
        first = progress.step == self.first_step + 1
        self.throughput.stepped(first)
        self.finish_gather()
        self.pending.append(PendingStep(progress.step, self.run.epoch, losses, norms, rate))
        if first:
            self.warmed_up()
        last = progress.step == self.run.last_step
        if last or progress.step % self.run.config.log.every == 0:
            self.start_gather()
            if last or self.run.sync_every_step:
                self.finish_gather()

    def warmed_up(self) -> None:
        """The first step of a life has been made: what it took (compiling, first allocations) is no step's
        time.
        """
        if self.run.world.device != "cpu":
            torch.cuda.synchronize()
        self.start.reached("first step")
        self.checkpoint_writer.reserve()
        self.speed = self.run.batch_plan.batch_size / (time.perf_counter() - self.clock)
        self.clock, self.uncounted = time.perf_counter(), 1

    def flush(self) -> None:
        """Read the pending steps from the device and write them."""
        self.finish_gather()
        self.start_gather()
        self.finish_gather()

    def start_gather(self, local: bool = False) -> None:
        """Send for the numbers of the pending steps; with `local`, those of this rank alone."""
        if not self.pending:
            return
        names, missing = list(self.pending[0].losses), torch.full((), math.nan, device=self.run.world.device)
        losses = torch.stack([step.losses[name] for step in self.pending for name in names])
        norms = torch.stack([step.norms.get(name, missing) for step in self.pending for name in names])
        self.asked = InFlight(self.pending, AsyncGather(torch.cat([losses, norms.to(losses)]), local))
        self.pending = []

    def finish_gather(self) -> None:
        """Read the numbers that were sent for, if any, and write their steps."""
        if self.asked is None:
            return
        steps, numbers = self.asked.steps, self.asked.numbers
        self.asked = None
        rows = numbers.wait().view(-1, 2, len(steps), len(steps[0].losses))
        mine = rows[self.run.world.rank if len(rows) > 1 else 0]
        # summed up here, rank by rank: what a reduction of several numbers adds first depends on how many
        # there are
        losses = mine[0] if self.run.sync_every_step else rows[:, 0].sum(0)
        self.look_at_speed(numbers.when, len(steps))
        lines = [
            self.line(step, *of_step)
            for step, *of_step in zip(steps, losses.float().tolist(), mine[1].float().tolist(), strict=True)
        ]
        self.write(lines)
        self.saved(self.checkpoint_writer.poll())
        self.console.step(lines[-1], self.run.last_step)
        for line in lines:
            nonfinite.check_late(self.run, line["step"], line["loss"])
        gc.collect(1)  # what is young; all of it with each evaluation

    def look_at_speed(self, now: float, steps: int) -> None:
        """At `now`, so many steps came to their end since last time."""
        counted = steps - self.uncounted
        seconds, self.clock, self.uncounted = now - self.clock, now, 0
        self.slowest_step = max(self.slowest_step, seconds / max(counted, 1))
        self.stop.update_margin(self.slowest_step, self.slowest_save)
        if counted:
            self.throughput.logged(seconds, counted)
            self.speed = counted * self.run.batch_plan.batch_size / seconds

    def line(self, step: PendingStep, losses: list[float], norms: list[float]) -> dict[str, Any]:
        """A line of metrics.jsonl; `losses` and `norms` of each model."""
        unit = self.run.recipe.item_name
        each = {f"loss/{name}": loss for name, loss in zip(step.losses, losses, strict=True)}
        return {
            "step": step.step,
            "epoch": round(step.epoch, 6),
            "samples": step.step * self.run.batch_plan.batch_size,
            "loss": sum(losses),
            **(each if len(each) > 1 else {}),
            "lr": step.rate,
            "grad_norm": math.hypot(*norms),
            "samples_per_second": round(self.speed, 1),
            **(
                {}
                if unit == "samples"
                else {f"{unit}_per_second": round(self.speed * self.throughput.units, 1)}
            ),
            "time": round(time.time(), 3),
        }

    def evaluation(self, scores: dict[str, Any], split: str = "eval") -> None:
        """Take note of an evaluation; numbers go to the screen, tables (a confusion matrix) to the file only."""
        self.flush()
        line = {f"{split}/{name}": value for name, value in scores.items()}
        self.scores.update(line)
        self.write([{"step": self.run.progress.step, **line}])
        self.console.evaluation(self.run.progress.step, line)
        gc.collect()
        self.clock = time.perf_counter()

    def agree(self, seldom: bool = True) -> None:
        """After each step, and each batch of an evaluation: what any rank wishes (to save by the clock, to
        stop), all hear.
        """
        rank_zero = self.run.world.rank == 0
        requests = {"stop"} if self.stop.requested(rank_zero) else set()
        if rank_zero and self.checkpoint_writer.overdue:
            requests.add("save")
        self.wanted |= self.consensus.exchange(requests, seldom)

    def stopping(self) -> bool:
        """Whether the ranks have agreed to stop; each asks at the same places."""
        self.agree(seldom=False)
        return "stop" in self.wanted

    @property
    def why_stopped(self) -> str:
        """In words of this rank; empty if the ranks have not agreed to."""
        return (self.stop.reason or "a signal to another rank") if "stop" in self.wanted else ""

    def checkpoint(self) -> None:
        """Save a checkpoint, behind the training."""
        self.flush()
        self.run.phase.enter("save")
        self.saved(self.checkpoint_writer.save())
        self.wanted |= (
            self.consensus.close()
        )  # the clock, too, was heard a step ago, and has asked again meanwhile
        self.wanted.discard("save")
        self.clock = time.perf_counter()

    def saved(self, saved: SaveResult | None) -> None:
        """Take note of a save that has ended. One that failed is told, and is no reason to lose the training
        too.
        """
        if saved is None:
            return
        self.saves.append(saved)
        self.slowest_save = max(self.slowest_save or 0.0, saved.blocking_s + saved.write_s)
        if saved.error:
            self.console.warn(f"{not_saved(saved)} The run goes on, and tries again at the next checkpoint.")
            return
        times = {"stall": round(saved.blocking_s, 4), "write": round(saved.write_s, 4), "bytes": saved.size}
        self.write([{"step": saved.step, **{f"checkpoint/{name}": value for name, value in times.items()}}])

    def finish(self) -> None:
        """The end of training: every step is written, the last checkpoint committed. Raises NotSaved if it
        could not be.
        """
        self.flush()
        self.run.phase.enter("save")
        self.consensus.close()
        last = self.checkpoint_writer.wait()
        if last is not None and last.error:
            raise SaveError(not_saved(last))
        self.saved(last)

    def summarize(self) -> None:
        """How fast it was, for the summary of a run that has come to its end. All ranks call it."""
        self.speeds = [
            *self.throughput.in_words(),
            *([f"started in {self.start}"] if self.start.parts else []),
        ]

    def abort(self) -> None:
        """After a failure: write what is known, and leave the save in flight the time to become whole. Asks no
        other rank.
        """
        if self.run.sync_every_step:  # else the numbers of the last steps are still spread over the ranks
            self.start_gather(local=True)
            self.finish_gather()
        self.checkpoint_writer.wait_briefly()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl. Floats are written with `repr`: two runs can be compared bit by bit."""
        if self.run.world.rank == 0:
            self.file.write("".join(json.dumps(line) + "\n" for line in lines))
            self.file.flush()

    def close(self) -> None:
        """The closing summary, of a run that has come to its end."""
        self.flush()
        if self.run.world.rank == 0:
            self.file.close()
        if self.why_stopped:
            return
        seconds = time.perf_counter() - self.started
        self.console.summary(
            self.run, self.first_step, seconds, self.scores, self.saves, self.run_dir, self.speeds
        )


def not_saved(saved: SaveResult) -> str:
    """Why there is no checkpoint."""
    return (
        f"step {saved.step} was not saved: {saved.error}. A rank writes about {decimal(saved.size)}; "
        "what was saved before is untouched."
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
