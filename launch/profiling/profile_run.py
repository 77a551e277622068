"""Steps of a run under torch.profiler, with the tables and the trace of what they do: `rankzero profile`."""

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


def check_config(config: Config) -> None:
    """Raise ValueError for keys of a run that would be what is measured, or are found by a run."""
    if config.debug:
        raise ValueError("debug= has no meaning here: its checks would be what is measured; drop it")
    if config.micro_batch_size == "auto":
        raise ValueError(
            "micro_batch_size=auto is found by a run that is out of memory; give the value that it found"
        )


def trace_path(given: str | None, config: Config, world: World) -> Path | None:
    """Where the trace of rank zero goes, with its directory made. Raises ValueError if it cannot go there."""
    if given is None:
        return None
    if given == "auto":
        name = Path(config.recipe.partition(":")[0]).stem
        started = time.strftime("%Y%m%d-%H%M%S")
        given = f"runs/profile/{name}/{started}-{config.strategy}-{world.world_size}.json.gz"
    if not given.endswith(".json.gz"):
        raise ValueError(f"trace={given} must end in .json.gz, or be null")
    if world.rank == 0:
        make_directory(Path(given))
    return Path(given)


def make_directory(trace: Path) -> None:
    """Make the directory of the trace. Raises ValueError if it cannot be written to: not after the profile,
    but before.
    """
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(trace.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"trace={trace}: {error.strerror}; name another file, or null") from None


def profile_run(settings: Settings, world: World, steps: int, warmup: int, trace: Path | None) -> int:
    """Connect, prepare, measure, print; returns the exit code. All ranks call it.

    `warmup` steps do not count, `steps` are measured; rank zero writes the `trace`. A failure ends the
    process, and with it the other ranks.
    """
    from launch.profiling.events import operation_times, step_marks
    from launch.profiling.measure import ProfiledPhase, gather_step_times, profile_steps
    from launch.profiling.step_table import print_profile
    from launch.runtime.rendezvous import process_group
    from launch.state.build import prepare
    from launch.training.supervise import supervise
    from launch.training.trainer import identity
    from launch.watchdog import fault_injection

    # torch 2.14 reports each start of its profiler, on each rank
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    config, phase = settings.config, ProfiledPhase()
    run_id = f"{identity(settings)} {steps} {warmup}"
    with (
        supervise(config, world, phase) as supervisor,
        process_group(world, config.strategy, config.start_timeout, run_id) as world,
    ):
        supervisor.watch(world)
        run = prepare(settings, world, phase)
        supervisor.start()
        fault_injection.install(run, Path(os.devnull))  # which has no checkpoint that could be torn
        profiler, unprofiled_s = profile_steps(run, phase, warmup, steps)
        events = profiler.events()  # type: ignore[no-untyped-call]  # torch has left it so
        ranks = gather_step_times(run, events, unprofiled_s)
        if world.rank == 0:
            operations = operation_times(events, world.device != "cpu")
            print_profile(run, ranks, operations, len(step_marks(events)))
        return write_trace(profiler, trace) if world.rank == 0 and trace else 0


def write_trace(profiler: profile, trace: Path) -> int:
    """Write the trace; returns the exit code."""
    try:
        profiler.export_chrome_trace(str(trace))
    except OSError as error:
        print(f"rankzero: trace={trace} was not written: {error}", file=sys.stderr)
        return 1
    print(f"trace of rank 0: {trace} (open it in https://ui.perfetto.dev)")
    return 0
