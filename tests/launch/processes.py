"""The real command in a process of its own: what it says, how it ends, and what it leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "launch" / "run.py"
TINY = Path(__file__).with_name("tiny.py")
MARK = "RANKZERO_TEST_FOLDER"
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_", "ACCELERATE_")


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    """of it and of all that it started: on an idle machine about what one waits for; other load does not show
    in it
    """

    @property
    def ours(self) -> list[str]:
        """What we said on stderr, leaving out what torchrun adds to it."""
        return [line for line in self.err.splitlines() if line.startswith("rankzero: ")]


def command(*words: str, ranks: int = 0, run: Path = RUN, restarts: int = 0) -> list[str]:
    """The command line; with `ranks` under torchrun, on a port that nobody else has."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
    ]
    launcher = torchrun if ranks else []
    return [sys.executable, *launcher, str(run), *words]


def start(
    *words: str, cwd: Path, ranks: int = 0, restarts: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, without what a launcher around the tests may have set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return subprocess.Popen(
        command(*words, ranks=ranks, restarts=restarts),
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: str(cwd), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60.0) -> Ended:
    """Wait for the end of a started command; on time-out kill its group and fail."""
    since, before = time.monotonic(), spent()
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout:g} s\n{out}\n{err}") from None
    return Ended(process.returncode, out, err, time.monotonic() - since, spent() - before)


def call(
    *words: str, cwd: Path, ranks: int = 0, env: Mapping[str, str] | None = None, timeout: float = 60.0
) -> Ended:
    """Run the command to its end."""
    return finish(start(*words, cwd=cwd, ranks=ranks, env=env), timeout)


def spent() -> float:
    """Processor time of all processes that have been waited for so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def offspring(cwd: Path) -> list[psutil.Process]:
    """The living processes that were started by a command in `cwd`, directly or not (torchrun's workers have
    own sessions).
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(cwd) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone, or not ours
            continue
    return found
