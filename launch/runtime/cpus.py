"""The processors that this process may use. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """The CPUs of this process: those that it is bound to, or fewer, if its container may not use them all of
    the time.
    """
    bound = len(os.sched_getaffinity(0))
    return max(min(bound, int(cpu_quota(cgroup) or bound)), 1)


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """CPUs that the container may use at once; None without a limit."""
    with suppress(OSError, ValueError):
        quota, _, period = (cgroup / "cpu.max").read_text().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    return None
