"""The trainer: one attempt of a run. Connect the ranks, prepare, resume, drive (train, test, export)."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from pathlib import Path

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.export import export_weights
from launch.checkpoint.init_weights import load_initial_weights
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from launch.checkpoint.writer import CheckpointWriter
from launch.cli.config import Config
from launch.cli.keys import to_dict
from launch.cli.resolve import Settings
from launch.reporting.console import Console
from launch.reporting.metrics import Metrics
from launch.reporting.summary import print_summary
from launch.reporting.throughput import StartupTimer
from launch.runtime.collectives import broadcast_object
from launch.runtime.exit_codes import ExitCode
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import process_group
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training import debug
from launch.training.evaluate import evaluate
from launch.training.loop import finish, train
from launch.training.run_dir import start_run_dir
from launch.training.stop_and_save import Requests
from launch.training.supervise import supervise
from launch.watchdog import auto_micro_batch, fault_injection
from launch.watchdog.stop import PREEMPTION_SIGNALS, StopRequest, deadline, write_stop_file
from launch.watchdog.watchdog import Watchdog


def run(settings: Settings, world: World, run_dir: Path) -> int:
    """Train to the end, or until preempted; returns the exit code. Any failure ends the process."""
    config, phase, startup = settings.config, Phase(), StartupTimer()
    startup.reached("imports")
    stop = StopRequest(deadline(config.max_time, os.environ))
    stop.listen(*PREEMPTION_SIGNALS)
    with (
        supervise(config, world, phase, stop) as supervisor,
        debug.mode(config, run_dir),
        process_group(world, config.strategy, config.start_timeout, identity(settings)) as world,
    ):
        watchdog = supervisor.watch(world)
        run_dir = agree_on_run_dir(config, world, run_dir)
        startup.reached("ranks")
        run = prepare(settings, world, phase)
        startup.reached("data and models")
        origin = load_or_resume(run, run_dir)
        if world.rank == 0:
            start_run_dir(run_dir, settings, world)
        supervisor.start(run_dir)
        stop.listen(signal.SIGINT)
        why_stopped = drive(run, run_dir, origin, stop, watchdog, startup)
        return exit_code(why_stopped, run, run_dir)


def agree_on_run_dir(config: Config, world: World, run_dir: Path) -> Path:
    """Rank zero's run directory, and its micro-batch size where that is `auto`. Collective."""
    size = config.micro_batch_size
    if size == "auto":
        size = auto_micro_batch.first_size(config, world, run_dir)
    name, config.micro_batch_size = broadcast_object((str(run_dir), size))
    return Path(name)


def drive(
    run: Run, run_dir: Path, origin: str, stop: StopRequest, watchdog: Watchdog, startup: StartupTimer
) -> str:
    """Train, then test and export. Collective. Returns why the run was stopped before its end; empty if it
    was
    not.
    """
    installed = versions()
    console = Console(run.world.rank == 0, lines=bool(run.config.debug))
    console.banner(run, run_dir, installed, origin)
    if run.config.debug:
        debug.examine(run, console)
        load_or_resume(run, run_dir)  # the models are new again
    metrics = Metrics(run, run_dir, console, startup)
    checkpoints = CheckpointWriter(run, run_dir, installed)
    requests = Requests(metrics, checkpoints, stop)
    watchdog.before_shut_down = checkpoints.wait_briefly
    fault_injection.install(run, run_dir)
    try:
        train(run, metrics, checkpoints, requests)
        finish(run, metrics, checkpoints, requests)
        evaluate_and_export(run, run_dir, metrics, requests, console)
        metrics.close()
    except Exception:
        metrics.abort()
        checkpoints.wait_briefly()
        raise
    return requests.stop_reason


def evaluate_and_export(
    run: Run, run_dir: Path, metrics: Metrics, requests: Requests, console: Console
) -> None:
    """Evaluate the test split, write model.safetensors, print the summary; not after a stop. Collective."""
    if not requests.stop and run.splits.test is not None:
        scores = evaluate(run, run.splits.test, requests)
        if scores is not None:
            metrics.evaluation(scores, "test")
    if requests.stop:
        return
    timing = list(metrics.timer.summary())
    if run.world.rank == 0:
        run.phase.enter("export")
        with Checkpoint(list_checkpoints(run_dir)[-1]) as newest:
            export_weights(newest, run_dir / "model.safetensors", on_progress=run.phase.tick)
    print_summary(console, run, metrics, timing)


def exit_code(why_stopped: str, run: Run, run_dir: Path) -> int:
    """The exit code of a run that has ended in good order; one that was stopped wants to be requeued."""
    if not why_stopped:
        return ExitCode.DONE
    if run.world.rank == 0:
        step = run.progress.step
        write_stop_file(run_dir, {"step": step, "reason": why_stopped})
        again = f"the same command with run_dir={run_dir} continues"
        print(f"rankzero: stopped ({why_stopped}); step {step} is saved, {again}", file=sys.stderr)
    return ExitCode.STOPPED


def identity(settings: Settings) -> str:
    """What this rank was asked to do: the same text on all ranks."""
    source = Path(inspect.getsourcefile(type(settings.recipe)) or "")
    code = source.read_text() if source.is_file() else ""
    return json.dumps([to_dict(settings.config), to_dict(settings.recipe), code])


def load_or_resume(run: Run, run_dir: Path) -> str:
    """Resume the checkpoint that `resume=` asks for, or load the weights of `init=`, or neither. Returns what
    was done, for the banner.
    """
    folder = resume(run, run_dir)
    if folder is not None:
        return f"continues {folder} at step {run.progress.step}"
    if run.config.init is not None:
        return load_initial_weights(run, run.config.init)
    return "new"
