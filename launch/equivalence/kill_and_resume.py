"""Runs that are killed, resumed and compared, one after the other. Imports no torch by itself."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from launch.checkpoint.directory import checkpoint_dir
from launch.equivalence.compare_metrics import same_weights
from launch.equivalence.kill_plan import Extent, KillPlan, plan_kills
from launch.equivalence.observed_run import (
    is_saving,
    last_logged_step,
    last_saved_step,
    read_metrics,
    resumed_from,
    step_seconds,
)
from launch.equivalence.resume_result import ResumeResult, compare_resumed
from launch.equivalence.run_arguments import args_for_strategy
from launch.equivalence.subprocesses import ProcessResult, RankLayout, run_process

MAX_ATTEMPTS = 3
"""to kill a run at a moment that a fast run may have passed before it is seen"""


class ResumeChecker:
    """Makes the rows of the table. `argv` are the arguments of the run, `environment` is that of its
    processes; the run directories lie in `folder`.
    """

    def __init__(
        self,
        extent: Extent,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        precision: str,
        seed: int,
    ) -> None:
        self.extent, self.argv, self.folder = extent, argv, folder
        self.environment, self.precision = environment, precision
        self.plans = plan_kills(extent)
        self.random = random.Random(seed)
        self.run_number, self.num_runs = 0, sum(plan.num_runs for plan in self.plans)

    def check(self) -> list[ResumeResult]:
        """Kill and resume all runs; returns the rows."""
        return [result for plan in self.plans for result in self.check_plan(plan)]

    def check_plan(self, plan: KillPlan) -> Iterator[ResumeResult]:
        """The rows of one strategy that is killed. What is not needed any more is removed: a state can be
        large.
        """
        layout, last_run = plan.layout, self.run_number + plan.num_runs
        uninterrupted = self.folder / f"{layout.strategy}-whole"
        process = self.start(layout, uninterrupted, "without interruption")
        shutil.rmtree(uninterrupted / "checkpoints", ignore_errors=True)
        for index, in_save in enumerate(plan.kills_in_save):
            run_dir = self.folder / f"{layout.strategy}-killed{'-saving' * in_save}"
            killed = ResumeResult(writer=layout, reader=layout, killed_in_save=in_save)
            readers = plan.readers if index == 0 else []
            others = [ResumeResult(writer=layout, reader=reader) for reader in readers]
            problem = f"the uninterrupted run: {process.problem}, its error is printed above"
            if not process.problem:
                problem = self.kill(killed, run_dir)
            if problem:
                for result in (killed, *others):
                    result.problems.append(problem)
            else:
                for result in others[::-1]:  # before the run itself resumes and drops the checkpoint
                    self.resume_elsewhere(result, run_dir, uninterrupted)
                self.resume_killed(killed, run_dir, uninterrupted)
            if not any(result.problems for result in (killed, *others)):
                shutil.rmtree(run_dir)
            yield from (killed, *others)
        self.run_number = last_run  # also if some runs were not needed

    def start(
        self,
        layout: RankLayout,
        run_dir: Path,
        description: str,
        *more: str,
        kill_when: Callable[[], bool] = lambda: False,
    ) -> ProcessResult:
        """Make one run, with its line on the screen; if it failed by itself, with its own error."""
        self.run_number += 1
        print(f"{self.run_number:>3}/{self.num_runs}  {f'{layout}, {description}':<58}", end="", flush=True)
        argv = [*args_for_strategy(self.argv, layout.strategy), *more]
        process = run_process(
            argv, layout, run_dir=run_dir, environment=self.environment, kill_when=kill_when
        )
        print(f"{process.seconds:7.1f} s", flush=True)
        if process.problem:
            print(f"{process.problem}; its last lines:", *process.error_lines(), sep="\n    ", flush=True)
        return process

    def kill(self, result: ResumeResult, run_dir: Path) -> str:
        """Start a run, and kill it after its checkpoint of half the way; returns what went wrong, empty if
        nothing.

        The first kill is aimed anywhere in a quarter of the run; a run that was too fast for this is killed
        as soon as it can be.
        """
        half, in_save = self.extent.half, result.killed_in_save
        last_target = self.extent.steps - self.extent.every
        for attempt in range(MAX_ATTEMPTS):
            shutil.rmtree(run_dir, ignore_errors=True)
            self.run_number -= attempt > 0
            target = self.random.randrange(half, last_target) if attempt == 0 else half
            if in_save and attempt < MAX_ATTEMPTS - 1:
                description, kill_when = "killed in a save", partial(is_in_save, run_dir, half)
            else:
                description = f"killed after step {target}"
                kill_when = partial(is_past_step, run_dir, half, target, self.random.random())
            description += f", attempt {attempt + 1}" * (attempt > 0)
            process = self.start(result.writer, run_dir, description, kill_when=kill_when)
            result.killed_at, result.resumed_from = last_logged_step(run_dir), last_saved_step(run_dir)
            result.killed_in_save = is_saving(run_dir)
            if process.problem:
                return f"before it was killed, {process.problem}: its error is printed above"
            in_time = process.reason == "killed" and half <= result.resumed_from < self.extent.steps
            if in_time and result.killed_in_save >= in_save:
                return ""
        if not in_time:
            return (
                f"{MAX_ATTEMPTS} times it ended before it could be killed: "
                f"compare={5 * self.extent.steps} leaves more time"
            )
        result.note = "no kill came in the middle of a save: saves are too short here"
        return ""

    def resume_killed(self, result: ResumeResult, run_dir: Path, uninterrupted: Path) -> None:
        """Start the killed run again, and compare it with the `uninterrupted` one, bit by bit."""
        process = self.start(result.reader, run_dir, f"resumed from step {result.resumed_from}")
        if process.problem:
            result.problems.append(f"{process.problem}: its error is printed above")
            return
        if (step := resumed_from(run_dir, process)) != result.resumed_from:
            result.problems.append(
                f"it continued from step {step}, not from the newest checkpoint, of step "
                f"{result.resumed_from}"
            )
        compare_resumed(result, read_metrics(uninterrupted), read_metrics(run_dir), self.precision)
        result.same_weights = same_weights(uninterrupted, run_dir)
        if not result.same_weights:
            result.problems.append("the final weights are not the same bytes")

    def resume_elsewhere(self, result: ResumeResult, killed: Path, uninterrupted: Path) -> None:
        """Start another layout from the killed run's checkpoint, and compare it with the `uninterrupted` run,
        to tolerance.
        """
        result.resumed_from = last_saved_step(killed)
        reader, writer = result.reader, result.writer
        run_dir = self.folder / f"{reader.strategy}-{reader.ranks}-from-{writer.strategy}"
        process = self.start(
            reader,
            run_dir,
            f"from step {result.resumed_from} of {writer}",
            f"resume={checkpoint_dir(killed, result.resumed_from)}",
        )
        if process.problem:
            result.problems.append(f"{process.problem}: its error is printed above")
            return
        compare_resumed(result, read_metrics(uninterrupted), read_metrics(run_dir), self.precision)
        if not result.problems:
            shutil.rmtree(run_dir)


def is_in_save(run_dir: Path, half: int) -> bool:
    """Whether a save is under way, and that of step `half` is complete."""
    return is_saving(run_dir) and last_saved_step(run_dir) >= half


def is_past_step(run_dir: Path, half: int, step: int, fraction: float) -> bool:
    """Whether `step` is done and the checkpoint of step `half` complete; returns after a `fraction` of the
    time of a step.
    """
    if last_logged_step(run_dir) < step or last_saved_step(run_dir) < half:
        return False
    time.sleep(fraction * step_seconds(run_dir))
    return True
