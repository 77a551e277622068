"""What happens when a run ends, once, for training and for `rankzero profile`.

    Ctrl-C before the training                 "interrupted", exit code 130
    the ranks did not come together            one line, 1
    a mistake of the user's before the start   one line, 2
    debug=true                                 the failure report, a debugger at a terminal, 1
    out of memory, micro_batch_size=auto       all ranks restart with a smaller one
    any other exception                        the failure report of the first rank that failed, 1

Each of them ends the process at once: nothing here waits for another rank, leaves the process group (under
NCCL that waits for the others) or runs exit handlers.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from launch.checkpoint.writer import SaveError
from launch.cli.config import Config
from launch.cli.exits import RANK_ZERO_GRACE_S, exit_with_mistake
from launch.runtime.exit_codes import ExitCode
from launch.runtime.phase import Phase
from launch.runtime.process_exit import exit_at_once
from launch.runtime.rendezvous import RendezvousError
from launch.runtime.world import World
from launch.training import debug
from launch.watchdog import auto_micro_batch
from launch.watchdog.exception_report import from_exception, from_message
from launch.watchdog.failure_report import FailureReport, render, write_once
from launch.watchdog.nonfinite import NonFinite
from launch.watchdog.stop import StopRequest
from launch.watchdog.watchdog import Watchdog

ALIKE_ON_ALL_RANKS = (NonFinite, SaveError)
"""errors whose message says it all, on all ranks: no line of code would add to it"""


@dataclass
class Supervisor:
    """What is known of a run when it ends."""

    config: Config
    world: World
    phase: Phase
    stop: StopRequest | None = None
    run_dir: Path | None = None
    watchdog: Watchdog | None = None
    """once the ranks are connected"""
    started: bool = False
    """whether everything is prepared: an error is a failure from then on, no mistake of the user's"""

    def __post_init__(self) -> None:
        self.auto_micro_batch = self.config.micro_batch_size == "auto"  # it is resolved later

    def watch(self, world: World) -> Watchdog:
        """The ranks are connected: start the watchdog."""
        self.world = world
        self.watchdog = Watchdog(world, self.phase, self.config.hang_timeout)
        return self.watchdog

    def start(self, run_dir: Path | None = None) -> None:
        """The run is prepared; failures are written into `run_dir`."""
        assert self.watchdog is not None
        self.run_dir = self.watchdog.run_dir = run_dir
        self.started = True

    def end(self, error: Exception) -> NoReturn:
        """End this process, and with it all ranks, for an exception."""
        mistake = not self.started and is_mistake(error)
        if self.watchdog is not None and (mistake or self.config.debug):
            self.watchdog.close()
        if mistake:
            if self.stop is not None:
                self.stop.restore_default_handlers()
            # a clean exit would take longer than the others wait
            exit_with_mistake(error, self.world.rank, exit_at_once)
        if self.watchdog is None or self.config.debug:
            self.end_alone(error)
        self.watchdog.fail(self.report(error), is_lost_peer(error))

    def end_alone(self, error: Exception) -> NoReturn:
        """End one process that no watchdog watches; with debug=true after a debugger."""
        report = from_exception(error, self.world, self.phase)
        if self.run_dir is not None:
            write_once(report, self.run_dir)
        print(render(report, None), file=sys.stderr, flush=True)
        if self.config.debug:
            debug.post_mortem(error)
        exit_at_once(ExitCode.FAILED)

    def report(self, error: Exception) -> FailureReport:
        """The failure report on an exception of this rank."""
        if self.started and self.auto_micro_batch:
            restart = auto_micro_batch.restart_report(error, self.config, self.world, self.phase)
            if restart is not None:
                return restart
        describe = from_message if isinstance(error, ALIKE_ON_ALL_RANKS) else from_exception
        return describe(error, self.world, self.phase)


@contextmanager
def supervise(
    config: Config, world: World, phase: Phase, stop: StopRequest | None = None
) -> Iterator[Supervisor]:
    """Around all that a run does. An exception ends the process; after success the watchdog is closed.

    The process group is left inside: while a rank waits in that for another one, which may still fail, the
    watchdog must be at work.
    """
    supervisor = Supervisor(config, world, phase, stop)
    try:
        yield supervisor
    except KeyboardInterrupt:
        if world.rank == 0:
            print("rankzero: interrupted", file=sys.stderr)
        exit_at_once(ExitCode.INTERRUPTED)
    except RendezvousError as error:
        if stop is not None:
            stop.restore_default_handlers()
        exit_unconnected(error, world)
    except Exception as error:
        supervisor.end(error)
    if supervisor.watchdog is not None:
        supervisor.watchdog.close()


def exit_unconnected(error: RendezvousError, world: World) -> NoReturn:
    """The ranks did not come together: one line, of rank zero; where it is not reached, one a node."""
    if world.rank > 0:
        time.sleep(RANK_ZERO_GRACE_S)  # the launcher ends this rank while rank zero prints
    if world.rank == 0 or (not error.known_to_all and (world.local_rank == 0 or world.rank == 1)):
        print(f"rankzero: {error}", file=sys.stderr, flush=True)
    exit_at_once(ExitCode.FAILED)


def is_mistake(error: Exception) -> bool:
    """Whether an error before the first step is the user's to correct: raised, with a message for them, by us
    or by the recipe itself.

    The same exception from the depths of a library is a failure and keeps its traceback.
    """
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].split(".")[0].startswith(("launch", "strategies", "recipe"))


def is_lost_peer(error: Exception) -> bool:
    """Whether the error says only that another rank is gone."""
    message = str(error)
    return isinstance(error, dist.DistNetworkError | dist.DistBackendError) or (
        isinstance(error, RuntimeError) and ("gloo" in message or "Connection closed by peer" in message)
    )
