"""See where the time of a step goes.

    torchrun --nproc_per_node=2 launch/commands/profile.py recipe=gpt strategy=fsdp
    python launch/commands/profile.py recipe=./mine.py precision=bf16 compile=true
        profile_steps=5                                       steps that are measured, and as many without the profiler before
        warmup_steps=5                                        steps before those, that do not count (they compile, and allocate)
        trace=runs/profile/RECIPE/TIME-STRATEGY-RANKS.json.gz where the trace of rank zero goes; null: nowhere

Makes real steps of the run, on its real data, under torch.profiler. Tells what share of a step is computing,
communication that nothing hides (exposed), copies between host and device, and idle, over all ranks; which
operations take most; which keys may help. The trace opens in https://ui.perfetto.dev. All keys of a run work
here too. Nothing is saved, evaluated or resumed: keys about that have no part in it. Exit codes: 0 done; 1
failed; 2 a mistake in the command.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import help
from launch.cli.config import exit_with_mistake, read_line
from launch.cli.resolve import Settings, resolve
from launch.equivalence.common import whole_number
from launch.runtime.process_exit import exit_normally
from launch.runtime.world import World, find_world

if TYPE_CHECKING:
    from torch.profiler import profile

OWN_KEYS = ("profile_steps", "warmup_steps", "trace")


@dataclass(frozen=True)
class Own:
    """What can be said to this command alone."""

    steps: int
    warmup: int
    trace: Path | None


def main(words: list[str]) -> None:
    """Profile what `words` say; the exit code tells how it ended."""
    world = World()
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return
        launcher = next(
            (word.removeprefix("launcher=") for word in words if word.startswith("launcher=")), "auto"
        )
        world = find_world(os.environ, launcher)
        settings = resolve(words, world, OWN_KEYS)
        own = own_keys(words, settings, world)
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, world.rank)
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch 2.14 tells each start of its profiler, on each rank
    exit_normally(run(settings, own, world))


def own_keys(words: list[str], settings: Settings, world: World) -> Own:
    """This command's own keys. Raises ValueError for what they cannot be."""
    line, config = read_line(words), settings.config
    if config.debug:
        raise ValueError("debug= has no meaning here: its checks would be what is measured; drop it")
    if config.micro_batch_size == "auto":
        raise ValueError(
            "micro_batch_size=auto is found by a run that is out of memory; say here what it has found"
        )
    steps = whole_number("profile_steps", line.get("profile_steps", "5"), "steps", 1)
    warmup = whole_number("warmup_steps", line.get("warmup_steps", "5"), "steps", 1)
    name = Path(config.recipe.partition(":")[0]).stem
    default = (
        f"runs/profile/{name}/{time.strftime('%Y%m%d-%H%M%S')}-{config.strategy}-{world.world_size}.json.gz"
    )
    trace = line.get("trace", default)
    if trace == "null":
        return Own(steps, warmup, None)
    if not trace.endswith(".json.gz"):
        raise ValueError(f"trace={trace} must end in .json.gz, or be null")
    if world.rank == 0:
        make_folder(Path(trace))
    return Own(steps, warmup, Path(trace))


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


def run(settings: Settings, own: Own, world: World) -> int:
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

    config, phase = settings.config, Phases()
    asked = f"{identity(settings)} {own.steps} {own.warmup}"
    with (
        supervise(config, world, phase) as supervisor,
        process_group(world, config.strategy, config.start_timeout, asked) as world,
    ):
        supervisor.watch(world)
        run = prepare(settings, world, phase)
        supervisor.start()
        fault_injection.install(run, Path(os.devnull))  # which has no checkpoint that could be torn
        profiler, plain = measured(run, phase, own.warmup, own.steps)
        events = profiler.events()  # type: ignore[no-untyped-call]  # torch has left it so
        rows = figures(run, events, plain)
        if world.rank == 0:
            show(run, rows, operations_of(events, world.device != "cpu"), len(steps_of(events)))
        return save(profiler, own.trace) if world.rank == 0 and own.trace else 0


def save(profiler: profile, trace: Path) -> int:
    """Write the trace; returns the exit code."""
    try:
        profiler.export_chrome_trace(str(trace))
    except OSError as error:
        print(f"rankzero: trace={trace} was not written: {error}", file=sys.stderr)
        return 1
    print(f"trace of rank 0: {trace} (open it in https://ui.perfetto.dev)")
    return 0
