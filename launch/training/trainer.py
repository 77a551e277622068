"""One life of a run: connect the ranks, prepare, resume, train, test, export."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from launch.checkpoint.directory import committed
from launch.checkpoint.export import export_weights
from launch.checkpoint.init_weights import initialise
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from launch.cli.config import PATIENCE, nested, stop_for
from launch.cli.resolve import Settings
from launch.reporting.console import Screen
from launch.reporting.metrics import Record
from launch.reporting.throughput import Start
from launch.runtime.collectives import from_rank_zero
from launch.runtime.phase import Place
from launch.runtime.rendezvous import NotAllThere, connected
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.run import Job, prepare
from launch.training import debug
from launch.training.loop import evaluate, train
from launch.training.run_dir import start_run_dir
from launch.watchdog import auto_micro_batch as memory
from launch.watchdog import fault_injection as chaos
from launch.watchdog.failure import fail
from launch.watchdog.failure_report import block, keep, of_exception
from launch.watchdog.stop import EXIT_CODE, SIGNALS, StopRequest, deadline, leave_note
from launch.watchdog.watchdog import Watch, end


def run(settings: Settings, world: World, run_dir: Path) -> int:
    """Train to the end, or to a stop on purpose; returns the exit code. A failure or mistake ends the process, never hangs."""
    config, place, start = settings.config, Place(), Start()
    start.reached("imports")
    stop = StopRequest(deadline(config.max_time, os.environ))
    stop.listen(*SIGNALS)
    watch: Watch | None = None
    started, finds_size = False, config.micro_batch_size == "auto"
    try:
        with debug.mode(config, run_dir), connected(world, config.strategy, config.start_timeout, identity(settings)) as world:
            watch = Watch(world, place, config.hang_timeout)
            size = memory.first_size(config, world, run_dir) if finds_size else config.micro_batch_size
            name, config.micro_batch_size = from_rank_zero((str(run_dir), size))
            run_dir = Path(name)
            start.reached("ranks")
            job = prepare(settings, world, place)
            start.reached("data and models")
            beginning = begin(job, run_dir)
            if world.rank == 0:
                start_run_dir(run_dir, settings, world)
            watch.run_dir, started = run_dir, True
            stop.listen(signal.SIGINT)
            why = drive(job, run_dir, beginning, stop, watch, start)
            watch.close()
            return stop_with(why, job, run_dir) if why else 0
    except KeyboardInterrupt:
        if world.rank == 0:
            print("rankzero: interrupted", file=sys.stderr)
        os._exit(130)  # a clean exit would wait for the other ranks
    except NotAllThere as error:
        stop.give_up()
        not_all_there(error, world)
    except Exception as error:
        mistake = not started and is_mistake(error)
        if watch is not None and (mistake or config.debug):
            watch.close()
        if mistake:
            stop.give_up()
            stop_for(error, world.rank, os._exit)  # a clean exit would take longer than the others wait
        if watch is None or config.debug:
            verdict = of_exception(error, world, place)
            if started:
                keep(verdict, run_dir)
            print(block(verdict, None), file=sys.stderr, flush=True)
            if config.debug:
                debug.post_mortem(error)
            end()
        fail(error, watch, memory.verdict_on(error, config, world, place) if started and finds_size else None)


def drive(job: Job, run_dir: Path, beginning: str, stop: StopRequest, watch: Watch, start: Start) -> str:
    """Banner, training, test, weights, summary. Returns why the run has stopped before its end; empty if it has not."""
    found = versions()
    screen = Screen(job.world.rank == 0, lines=bool(job.config.debug))
    screen.banner(job, run_dir, found, beginning)
    if job.config.debug:
        debug.examine(job, screen)
        begin(job, run_dir)  # the models are new again
    record = Record(job, run_dir, found, screen, stop, start)
    watch.before_end = record.saver.linger
    chaos.prepare(job, run_dir)
    try:
        why = train(job, record)
        record.settle()
        if not why and job.splits.test is not None:
            scores = evaluate(job, job.splits.test, record.stopping)
            why = record.why_stopped
            if scores is not None:
                record.evaluation(scores, "test")
        if not why:
            record.sum_up()
        if not why and job.world.rank == 0:
            job.place.at("export")
            with Checkpoint(committed(run_dir)[-1]) as newest:
                export_weights(newest, run_dir / "model.safetensors", told=job.place.still_there)
        record.close()
    except Exception:
        record.abandon()
        raise
    return why


def stop_with(why: str, job: Job, run_dir: Path) -> int:
    """The end of a run that has stopped on purpose and been saved."""
    if job.world.rank == 0:
        step = job.progress.step
        leave_note(run_dir, {"step": step, "reason": why})
        print(
            f"rankzero: stopped ({why}); step {step} is saved, the same command with run_dir={run_dir} goes on", file=sys.stderr
        )
    return EXIT_CODE


def not_all_there(error: NotAllThere, world: World) -> NoReturn:
    """The ranks did not come together: one line, from rank zero; where rank zero is not reached, one a node."""
    if world.rank > 0:
        time.sleep(PATIENCE)  # the launcher ends this rank while rank zero speaks
    if world.rank == 0 or (not error.known_to_all and (world.local_rank == 0 or world.rank == 1)):
        print(f"rankzero: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def identity(settings: Settings) -> str:
    """What this rank was asked to do: the same text on all ranks."""
    source = Path(inspect.getsourcefile(type(settings.recipe)) or "")
    return json.dumps([nested(settings.config), nested(settings.recipe), source.read_text() if source.is_file() else ""])


def begin(job: Job, run_dir: Path) -> str:
    """Take up the run that `resume` asks for, or begin a new one; says in words which."""
    folder = resume(job, run_dir)
    if folder is not None:
        return f"continues {folder} at step {job.progress.step}"
    if job.config.init is not None:
        return initialise(job, job.config.init)
    return "new"


def is_mistake(error: Exception) -> bool:
    """Whether an error before the first step is the user's to mend: raised, in words, by us or by the recipe itself.

    The same exception out of a library's depths is a failure and keeps its traceback.
    """
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].split(".")[0].startswith(("launch", "strategies", "recipe"))
