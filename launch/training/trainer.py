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

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.export import export_weights
from launch.checkpoint.init_weights import load_initial_weights
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from launch.cli.config import RANK_ZERO_GRACE_S, exit_with_mistake, nested
from launch.cli.resolve import Settings
from launch.reporting.console import Console
from launch.reporting.metrics import Metrics
from launch.reporting.throughput import Start
from launch.runtime.collectives import broadcast_object
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import RendezvousError, process_group
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training import debug
from launch.training.loop import evaluate, train
from launch.training.run_dir import start_run_dir
from launch.watchdog import auto_micro_batch, fault_injection
from launch.watchdog.failure import fail
from launch.watchdog.failure_report import from_exception, render, write_once
from launch.watchdog.stop import EXIT_CODE, SIGNALS, StopRequest, deadline, leave_note
from launch.watchdog.watchdog import Watchdog, end


def run(settings: Settings, world: World, run_dir: Path) -> int:
    """Train to the end, or to a stop on purpose; returns the exit code. A failure or mistake ends the
    process, never hangs.
    """
    config, phase, start = settings.config, Phase(), Start()
    start.reached("imports")
    stop = StopRequest(deadline(config.max_time, os.environ))
    stop.listen(*SIGNALS)
    watchdog: Watchdog | None = None
    started, finds_size = False, config.micro_batch_size == "auto"
    try:
        with (
            debug.mode(config, run_dir),
            process_group(world, config.strategy, config.start_timeout, identity(settings)) as world,
        ):
            watchdog = Watchdog(world, phase, config.hang_timeout)
            size = (
                auto_micro_batch.first_size(config, world, run_dir) if finds_size else config.micro_batch_size
            )
            name, config.micro_batch_size = broadcast_object((str(run_dir), size))
            run_dir = Path(name)
            start.reached("ranks")
            run = prepare(settings, world, phase)
            start.reached("data and models")
            beginning = begin(run, run_dir)
            if world.rank == 0:
                start_run_dir(run_dir, settings, world)
            watchdog.run_dir, started = run_dir, True
            stop.listen(signal.SIGINT)
            why = drive(run, run_dir, beginning, stop, watchdog, start)
            code = stop_with(why, run, run_dir) if why else 0
        watchdog.close()  # only now: leaving the group may wait for a rank that fails while it exports
        return code
    except KeyboardInterrupt:
        if world.rank == 0:
            print("rankzero: interrupted", file=sys.stderr)
        os._exit(130)  # a clean exit would wait for the other ranks
    except RendezvousError as error:
        stop.give_up()
        not_all_there(error, world)
    except Exception as error:
        mistake = not started and is_mistake(error)
        if watchdog is not None and (mistake or config.debug):
            watchdog.close()
        if mistake:
            stop.give_up()
            exit_with_mistake(
                error, world.rank, os._exit
            )  # a clean exit would take longer than the others wait
        if watchdog is None or config.debug:
            verdict = from_exception(error, world, phase)
            if started:
                write_once(verdict, run_dir)
            print(render(verdict, None), file=sys.stderr, flush=True)
            if config.debug:
                debug.post_mortem(error)
            end()
        fail(
            error,
            watchdog,
            auto_micro_batch.verdict_on(error, config, world, phase) if started and finds_size else None,
        )


def drive(
    run: Run, run_dir: Path, beginning: str, stop: StopRequest, watchdog: Watchdog, start: Start
) -> str:
    """Banner, training, test, weights, summary. Returns why the run has stopped before its end; empty if it
    has not.
    """
    found = versions()
    console = Console(run.world.rank == 0, lines=bool(run.config.debug))
    console.banner(run, run_dir, found, beginning)
    if run.config.debug:
        debug.examine(run, console)
        begin(run, run_dir)  # the models are new again
    metrics = Metrics(run, run_dir, found, console, stop, start)
    watchdog.before_end = metrics.checkpoint_writer.wait_briefly
    fault_injection.prepare(run, run_dir)
    try:
        why = train(run, metrics)
        metrics.finish()
        if not why and run.splits.test is not None:
            scores = evaluate(run, run.splits.test, metrics.stopping)
            why = metrics.why_stopped
            if scores is not None:
                metrics.evaluation(scores, "test")
        if not why:
            metrics.summarize()
        if not why and run.world.rank == 0:
            run.phase.enter("export")
            with Checkpoint(list_checkpoints(run_dir)[-1]) as newest:
                export_weights(newest, run_dir / "model.safetensors", on_progress=run.phase.tick)
        metrics.close()
    except Exception:
        metrics.abort()
        raise
    return why


def stop_with(why: str, run: Run, run_dir: Path) -> int:
    """The end of a run that has stopped on purpose and been saved."""
    if run.world.rank == 0:
        step = run.progress.step
        leave_note(run_dir, {"step": step, "reason": why})
        print(
            f"rankzero: stopped ({why}); step {step} is saved, the same command with run_dir={run_dir} goes on",
            file=sys.stderr,
        )
    return EXIT_CODE


def not_all_there(error: RendezvousError, world: World) -> NoReturn:
    """The ranks did not come together: one line, from rank zero; where rank zero is not reached, one a node."""
    if world.rank > 0:
        time.sleep(RANK_ZERO_GRACE_S)  # the launcher ends this rank while rank zero speaks
    if world.rank == 0 or (not error.known_to_all and (world.local_rank == 0 or world.rank == 1)):
        print(f"rankzero: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def identity(settings: Settings) -> str:
    """What this rank was asked to do: the same text on all ranks."""
    source = Path(inspect.getsourcefile(type(settings.recipe)) or "")
    return json.dumps(
        [nested(settings.config), nested(settings.recipe), source.read_text() if source.is_file() else ""]
    )


def begin(run: Run, run_dir: Path) -> str:
    """Take up the run that `resume` asks for, or begin a new one; says in words which."""
    folder = resume(run, run_dir)
    if folder is not None:
        return f"continues {folder} at step {run.progress.step}"
    if run.config.init is not None:
        return load_initial_weights(run, run.config.init)
    return "new"


def is_mistake(error: Exception) -> bool:
    """Whether an error before the first step is the user's to mend: raised, in words, by us or by the recipe
    itself.

    The same exception out of a library's depths is a failure and keeps its traceback.
    """
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].split(".")[0].startswith(("launch", "strategies", "recipe"))
