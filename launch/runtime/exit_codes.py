"""Exit codes of all commands and of every rank, in one table."""

from __future__ import annotations

DONE = 0
FAILED = 1
MISTAKE = 2
"""a mistake in the command, reported in one line"""
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: stopped on purpose and saved; the same command continues the run"""
INTERRUPTED = 130
"""ended at once by Ctrl-C: 128 + SIGINT, as a shell reports it"""
