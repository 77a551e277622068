"""The lives of a run: who has started it again (torchrun, SLURM, the run itself), and how it does that
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

BY_ITSELF, BORN = "RANKZERO_RESTART_COUNT", "RANKZERO_BORN"
"""how often a process has replaced itself, and when it last has, in seconds since the machine was booted"""
COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", BY_ITSELF)


def restart_count(environment: Mapping[str, str]) -> int:
    """How often this run has been started again without anybody typing the command."""
    return sum(int(environment.get(name) or 0) for name in COUNTS)


def attempt_id(environment: Mapping[str, str]) -> str:
    """What tells this life from the former ones at one meeting point: of torchrun's restarts and of our own."""
    return f"{environment.get(COUNTS[0], '0')}-{environment.get(BY_ITSELF, '0')}"


def reexec(run_dir: Path | None) -> NoReturn:
    """Replace this process by a new one that runs the same command, in `run_dir`; may be called by any
    thread.

    For the launcher it is the same process. Nothing stays of the old one: not its memory, on a GPU neither,
    nor its threads, collectives and open files.
    """
    import psutil  # a good part of what `--help` may take

    children = psutil.Process().children(recursive=True)  # workers that load data
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=3)
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) > 2:
            with suppress(OSError):  # the one that has listed them
                os.set_inheritable(int(entry.name), False)
    os.environ[BY_ITSELF] = str(int(os.environ.get(BY_ITSELF, "0")) + 1)
    os.environ[BORN] = str(time.clock_gettime(time.CLOCK_BOOTTIME))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:], *([] if run_dir is None else [f"run_dir={run_dir}"])],
    )
