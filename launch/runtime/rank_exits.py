"""How the ranks of an agent ended: one exit code for all, a line for each that gave no reason. No torch."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping

from launch.runtime.exit_codes import ExitCode

ON_PURPOSE = (ExitCode.MISTAKE, ExitCode.STOPPED, ExitCode.INTERRUPTED)
"""exit codes after which the ranks are not restarted: it would end the same way, or is not wanted"""
REPORTED = (ExitCode.DONE, ExitCode.FAILED, *ON_PURPOSE)
"""exit codes of ranks that have explained themselves"""


def exit_code_of(codes: Iterable[int], forwarded: Iterable[int] = ()) -> int:
    """The exit code of an agent whose ranks ended with `codes`, negative for signals as Popen has them.

    A rank that a `forwarded` signal ended, before it could stop in good order, counts as the signal; one that
    another signal ended has failed. A failure outweighs a stop, a mistake or Ctrl-C outweighs both.
    """
    signaled = {-number for number in forwarded}
    kinds = {128 - code if code in signaled else ExitCode.FAILED if code < 0 else code for code in codes}
    for code in (ExitCode.INTERRUPTED, ExitCode.MISTAKE, ExitCode.FAILED):
        if code in kinds:
            return code
    return max(kinds, default=ExitCode.DONE)


def unexplained(codes: Mapping[int, int], host: str, forwarded: Iterable[int] = ()) -> list[str]:
    """A line for each rank that ended without a word: by a signal that was not forwarded to it, or with a
    code of its own.
    """
    lines = []
    for rank, code in sorted(codes.items()):
        if code < 0 and -code not in forwarded:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            cause = "; out of memory? `dmesg` tells" if -code == signal.SIGKILL else ""
            lines.append(f"rank {rank} on {host} was killed by signal {-code} ({name}){cause}")
        elif code > 0 and code not in REPORTED:
            lines.append(f"rank {rank} on {host} ended with exit code {code}")
    return lines
