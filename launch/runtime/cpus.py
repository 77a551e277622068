"""The CPUs that this process may use. No torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """The CPUs in this process's affinity, or fewer, if the quota of its container (cgroup) is smaller."""
    affinity = len(os.sched_getaffinity(0))
    return max(min(affinity, int(cpu_quota(cgroup) or affinity)), 1)


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """CPUs that the container may keep busy; None without a limit."""
    with suppress(OSError, ValueError):
        quota, _, period = (cgroup / "cpu.max").read_text().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    return None
