"""Steps of a run under torch.profiler, with the figures and the trace of what they do: `rankzero profile`."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.config import Config
from launch.cli.resolve import Settings
from launch.runtime.world import World

if TYPE_CHECKING:
    from torch.profiler import profile


def refuse(config: Config) -> None:
    """Raise ValueError for keys of a run that would be what is measured, or are found by a run."""
    if config.debug:
        raise ValueError("debug= has no meaning here: its checks would be what is measured; drop it")
    if config.micro_batch_size == "auto":
        raise ValueError(
            "micro_batch_size=auto is found by a run that is out of memory; give the value that it found"
        )


def trace_path(given: str | None, config: Config, world: World) -> Path | None:
    """Where the trace of rank zero goes, with its folder made. Raises ValueError for where it cannot go."""
    if given is None:
        return None
    if given == "auto":
        name = Path(config.recipe.partition(":")[0]).stem
        started = time.strftime("%Y%m%d-%H%M%S")
        given = f"runs/profile/{name}/{started}-{config.strategy}-{world.world_size}.json.gz"
    if not given.endswith(".json.gz"):
        raise ValueError(f"trace={given} must end in .json.gz, or be null")
    if world.rank == 0:
        make_folder(Path(given))
    return Path(given)


def make_folder(trace: Path) -> None:
    """Make the folder of the trace. Raises ValueError if it cannot be written to: not after the profile, but
    before.
    """
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(trace.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"trace={trace}: {error.strerror}; name another place, or null") from None


def run(settings: Settings, world: World, steps: int, warmup: int, trace: Path | None) -> int:
    """Connect, prepare, measure, print; returns the exit code. A failure ends the process, and with it the
    other ranks.
    """
    from launch.profiling.events import operations_of, steps_of
    from launch.profiling.measure import Phases, figures, measured
    from launch.profiling.report import show
    from launch.runtime.rendezvous import process_group
    from launch.state.build import prepare
    from launch.training.supervise import supervise
    from launch.training.trainer import identity
    from launch.watchdog import fault_injection

    # torch 2.14 reports each start of its profiler, on each rank
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    config, phase = settings.config, Phases()
    asked = f"{identity(settings)} {steps} {warmup}"
    with (
        supervise(config, world, phase) as supervisor,
        process_group(world, config.strategy, config.start_timeout, asked) as world,
    ):
        supervisor.watch(world)
        run = prepare(settings, world, phase)
        supervisor.start()
        fault_injection.install(run, Path(os.devnull))  # which has no checkpoint that could be torn
        profiler, plain = measured(run, phase, warmup, steps)
        events = profiler.events()  # type: ignore[no-untyped-call]  # torch has left it so
        rows = figures(run, events, plain)
        if world.rank == 0:
            show(run, rows, operations_of(events, world.device != "cpu"), len(steps_of(events)))
        return save(profiler, trace) if world.rank == 0 and trace else 0


def save(profiler: profile, trace: Path) -> int:
    """Write the trace; returns the exit code."""
    try:
        profiler.export_chrome_trace(str(trace))
    except OSError as error:
        print(f"rankzero: trace={trace} was not written: {error}", file=sys.stderr)
        return 1
    print(f"trace of rank 0: {trace} (open it in https://ui.perfetto.dev)")
    return 0
