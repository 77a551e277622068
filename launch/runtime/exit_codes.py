"""Exit codes of all commands and of every rank, in one table. No torch."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of all commands."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    """a mistake in the command, reported in one line"""
    STOPPED = 75
    """EX_TEMPFAIL of sysexits.h: stopped on purpose and saved; schedulers start such a job again"""
    INTERRUPTED = 130
    """128 + SIGINT, as shells count"""
