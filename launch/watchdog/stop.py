"""Stopping on purpose: a signal or the clock asks, the ranks agree at a step boundary, the run is saved and
can go on.

Nothing is done inside a signal handler but to take note: a save is collective, and a signal comes at any
moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from launch.cli.durations import parse_duration
from launch.runtime.files import write_text_atomically

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: stopped on purpose, start it again to go on"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""schedulers send them before they end a job; Ctrl-C asks for the same while a run trains"""
FILE = "stopped.json"
UNKNOWN_SAVE = 30.0
"""seconds that a first save may take, for the margin before it has been measured"""
MARGIN = 10.0
"""seconds to spare, beyond what is measured"""


class Stopped(Exception):
    """The run has stopped on purpose, and all of it is saved; the message says why."""


class StopRequest:
    """Whether this rank wishes the run to stop, and why."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.reason = ""
        self.owner = os.getpid()
        self.margin = UNKNOWN_SAVE + MARGIN

    def listen(self, *signals: signal.Signals) -> None:
        """Take note of `signals` from now on, instead of ending."""
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                signal.signal(number, self.heard)

    def give_up(self) -> None:
        """There is nothing to save: let signals end this process, as the launcher means it that ends all
        ranks.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def heard(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal handler. A process that was forked off has inherited it, and ends as it would have."""
        if os.getpid() != self.owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and self.reason:
            os._exit(130)
        else:
            self.reason = signal.Signals(number).name
            if number == signal.SIGINT:
                os.write(
                    sys.stderr.fileno(), b"\nrankzero: stopping soon, and saving; Ctrl-C again ends at once\n"
                )

    def wished(self, by_clock: bool) -> bool:
        """Whether to stop now: a signal came or, `by_clock`, there is just time left to finish a step and to
        save.
        """
        if (
            by_clock
            and not self.reason
            and self.deadline is not None
            and time.time() + self.margin > self.deadline
        ):
            self.reason = "its time is up"
        return bool(self.reason)

    def measured(self, step: float, save: float | None) -> None:
        """How long a step and a save (if there was one yet) take at most: the margin before the deadline
        follows them.
        """
        self.margin = MARGIN + 2 * step + (UNKNOWN_SAVE if save is None else 2 * save)


def deadline(max_time: str | None, environment: Mapping[str, str]) -> float | None:
    """When the run has to have ended, in seconds since the epoch: by `max_time` from its start, or by SLURM's
    time limit.
    """
    import psutil

    # from the start of the process: it stays the same one if the run begins again by itself
    ends = [psutil.Process().create_time() + parse_duration(max_time)] if max_time is not None else []
    if environment.get("SLURM_JOB_END_TIME", "").isdecimal():
        ends.append(float(environment["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


def leave_note(run_dir: Path, note: dict[str, Any]) -> None:
    """Tell whoever started the run that it wants to be started again. On rank zero, after the last save is
    committed.
    """
    import json

    write_text_atomically(run_dir / FILE, json.dumps({**note, "time": round(time.time(), 3)}) + "\n")
