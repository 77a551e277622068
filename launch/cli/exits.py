"""How a command ends: what the exit codes mean, and the one line for a mistake. No torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

from launch.runtime.exit_codes import ExitCode

MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed",
    ExitCode.MISTAKE: "a mistake in the command, reported in one line; nothing was started",
    ExitCode.STOPPED: "stopped on purpose (a signal, the time limit); the same command continues",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}
"""what an exit code means, unless a command's own table says it more exactly"""
RANK_ZERO_GRACE_S = 5.0
"""seconds that the other ranks leave to rank zero to print: it ends then, and the launcher ends them"""


def exit_with_mistake(
    error: Exception, rank: int = 0, leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """One line for a user's mistake, from rank zero, and exit code 2.

    The first rank to end makes the launcher end the others: these wait, else rank zero might be ended before
    it printed. A rank that is still there after that has made a mistake that rank zero has not (no data on
    its node), and prints its own.
    """
    if rank > 0:
        time.sleep(RANK_ZERO_GRACE_S)
    print(f"rankzero: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    leave(ExitCode.MISTAKE)
