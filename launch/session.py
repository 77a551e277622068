"""One life of a run: connect the ranks, prepare, resume, train, test, export."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from launch import checkpoint, debug, failure
from launch.command import Settings
from launch.config import stop_for
from launch.job import Job, prepare
from launch.loop import evaluate, train
from launch.record import Record
from launch.run_dir import start_run_dir
from launch.screen import Screen
from launch.versions import versions
from launch.world import World, connected, from_rank_zero


def run(settings: Settings, world: World, run_dir: Path) -> None:
    """Train to the end. Leaves the process with exit code 2 for a user's mistake and 1 for a failure; never hangs on either."""
    job: Job | None = None
    started = False
    try:
        with debug.mode(settings.config, run_dir), connected(world, settings.config.strategy) as world:
            run_dir = Path(from_rank_zero(str(run_dir)))
            job = prepare(settings, world)
            resumed = resume(job, run_dir)
            if world.rank == 0:
                start_run_dir(run_dir, settings, world)
            started = True
            drive(job, run_dir, resumed)
    except KeyboardInterrupt:
        if world.rank == 0:
            print(f"rankzero: interrupted{'' if job is None else f' at step {job.progress.step}'}", file=sys.stderr)
        os._exit(130)  # a clean exit would wait for the other ranks
    except Exception as error:
        if not started and is_mistake(error):
            stop_for(error, world.rank)
        failure.report(error, run_dir if started else None, world.rank, None if job is None else job.progress.step + 1)
        if settings.config.debug:
            debug.post_mortem(error)
        failure.leave()


def drive(job: Job, run_dir: Path, resumed: str) -> None:
    """Banner, training, test, weights, summary."""
    found = versions()
    screen = Screen(job.world.rank == 0, lines=bool(job.config.debug))
    screen.banner(job, run_dir, found, resumed)
    if job.config.debug:
        debug.examine(job, screen)
        resume(job, run_dir)  # the models are new again
    record = Record(job, run_dir, found, screen)
    try:
        train(job, record)
    except Exception:
        if job.careful:  # else the numbers of the last steps are still spread over the ranks
            record.flush()
        raise
    if job.splits.test is not None:
        record.evaluation(evaluate(job, job.splits.test), "test")
    checkpoint.export(job, run_dir / "model.safetensors")
    record.close()


def resume(job: Job, run_dir: Path) -> str:
    """Take up the run that `resume` asks for; says in words where it starts."""
    wanted = job.config.resume
    if wanted == "none":
        return "new"
    if wanted == "auto":
        found = checkpoint.complete(run_dir / "checkpoints")
        folder = from_rank_zero(str(found[-1]) if found else "")
        if not folder:
            return "new"
    else:
        inside = checkpoint.complete(Path(wanted) / "checkpoints")
        folder = str(inside[-1]) if inside else wanted
    checkpoint.load(job, Path(folder))
    return f"continues {folder} at step {job.progress.step}"


def is_mistake(error: Exception) -> bool:
    """Whether an error before the first step is the user's to mend: raised, in words, by us or by the recipe itself.

    The same exception out of a library's depths is a failure and keeps its traceback.
    """
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].split(".")[0].startswith(("launch", "strategies", "recipe"))
