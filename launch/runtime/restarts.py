"""Restarts: how often a run has been restarted (by torchrun, by SLURM, by itself), and how it re-executes
itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

REEXEC_COUNT, REEXEC_TIME = "RANKZERO_RESTART_COUNT", "RANKZERO_BORN"
"""how often a process has re-executed itself, and when it last has, in seconds since the machine was booted
"""
TORCHRUN_COUNT, SLURM_COUNT = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"


def restart_count(environment: Mapping[str, str]) -> int:
    """How often this run has been restarted without anybody typing the command."""
    return sum(int(environment.get(name) or 0) for name in (TORCHRUN_COUNT, SLURM_COUNT, REEXEC_COUNT))


def attempt_id(environment: Mapping[str, str]) -> str:
    """What tells this attempt from those before it at the same store: torchrun's restarts and our own."""
    return f"{environment.get(TORCHRUN_COUNT, '0')}-{environment.get(REEXEC_COUNT, '0')}"


def reexec(run_dir: Path | None) -> NoReturn:
    """Replace this process by a new one that runs the same command, in `run_dir`; any thread may call it.

    For the launcher it is the same process. Nothing stays of the old one: no memory, on the GPU neither, no
    threads, collectives or open files. The process group is not left: the others may wait in a collective.
    """
    import psutil  # a good part of what `--help` may take

    children = psutil.Process().children(recursive=True)  # workers that load data
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=3)
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) > 2:
            with suppress(OSError):  # the one that lists them
                os.set_inheritable(int(entry.name), False)
    os.environ[REEXEC_COUNT] = str(int(os.environ.get(REEXEC_COUNT, "0")) + 1)
    os.environ[REEXEC_TIME] = str(time.clock_gettime(time.CLOCK_BOOTTIME))
    sys.stdout.flush()
    sys.stderr.flush()
    argv = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, argv if run_dir is None else [*argv, f"run_dir={run_dir}"])
