"""Preemption: a signal (SIGTERM, SIGUSR1) or the time limit requests a stop; the run is saved, and requeued
it resumes.

A signal handler only notes the request: a save is collective, and a signal comes at any moment. The ranks
agree between two steps (`consensus.py`), save, and end with exit code 75, which asks a scheduler to requeue
the job. The time limit is `max_time=` or SLURM's own, less a margin for one more step and save.
"""

from __future__ import annotations

import json
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
from launch.runtime.exit_codes import ExitCode
from launch.runtime.files import write_text_atomically
from launch.runtime.slurm_env import job_end_time

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""schedulers send them before they end a job; Ctrl-C requests the same while a run trains"""
STOP_FILE = "stopped.json"
FIRST_SAVE_S = 30.0
"""seconds that a first save may take, for the margin before it has been measured"""
MARGIN_S = 10.0
"""seconds to spare, beyond what is measured"""


class StopRequest:
    """Whether this rank requests that the run stops, and why."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.reason = ""
        self.owner = os.getpid()
        self.margin = FIRST_SAVE_S + MARGIN_S

    def listen(self, *signals: signal.Signals) -> None:
        """From now on, `signals` request a stop instead of ending the process."""
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                signal.signal(number, self.on_signal)

    def restore_default_handlers(self) -> None:
        """There is nothing to save: let signals end this process, as the launcher intends that ends all
        ranks.
        """
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The signal handler. A forked process has inherited it, and ends as it would have without."""
        if os.getpid() != self.owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and self.reason:
            os._exit(ExitCode.INTERRUPTED)
        else:
            self.reason = signal.Signals(number).name
            if number == signal.SIGINT:
                os.write(
                    sys.stderr.fileno(), b"\nrankzero: stopping soon, and saving; Ctrl-C again ends at once\n"
                )

    def requested(self, by_clock: bool) -> bool:
        """Whether to stop now: a signal came or, `by_clock`, there is just time left to finish a step and to
        save.
        """
        timed_out = self.deadline is not None and time.time() + self.margin > self.deadline
        if by_clock and not self.reason and timed_out:
            self.reason = "its time is up"
        return bool(self.reason)

    def update_margin(self, step_s: float, save_s: float | None) -> None:
        """Follow the seconds that a step and a save (None: there was none yet) take at most."""
        self.margin = MARGIN_S + 2 * step_s + (FIRST_SAVE_S if save_s is None else 2 * save_s)


def deadline(max_time: str | None, environment: Mapping[str, str]) -> float | None:
    """When the run has to have ended, in seconds since the epoch: `max_time` after its start, or at SLURM's
    time limit.
    """
    import psutil

    # from the start of the process: a run that re-executes itself stays the same one
    ends = [psutil.Process().create_time() + parse_duration(max_time)] if max_time is not None else []
    if (end := job_end_time(environment)) is not None:
        ends.append(end)
    return min(ends, default=None)


def write_stop_file(run_dir: Path, content: dict[str, Any]) -> None:
    """Tell whoever started the run that it wants to be requeued. On rank zero, after the last checkpoint is
    committed.
    """
    text = json.dumps({**content, "time": round(time.time(), 3)}) + "\n"
    write_text_atomically(run_dir / STOP_FILE, text)
