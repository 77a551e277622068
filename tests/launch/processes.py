"""Run the real commands as subprocesses: their exit code, their output, and the processes that they leave."""

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
RUN_SCRIPT = ROOT / "launch" / "run.py"
TINY = Path(__file__).with_name("tiny.py")
FOLDER_VARIABLE = "RANKZERO_TEST_FOLDER"
"""environment variable that marks all processes of a command, also those in sessions of their own"""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_", "ACCELERATE_")
"""prefixes of the environment variables that torchrun, srun and Accelerate set"""
PATIENCE = 10.0
"""how many times longer than on an idle machine a test waits before it fails: one may be slow or busy"""
COMMAND_TIMEOUT_S = PATIENCE * 30.0
"""until a command counts as hanging: on an idle machine the longest ends within half a minute"""


def free_port() -> int:
    """A TCP port that no process listens on now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@dataclass(frozen=True)
class CommandResult:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    """from the call of `wait_for_command` to the end"""
    cpu_seconds: float
    """processor time of the command and of all its children: hardly more on a busy machine"""

    @property
    def messages(self) -> list[str]:
        """The lines of rankzero on stderr, without those of torchrun and of libraries."""
        return [line for line in self.stderr.splitlines() if line.startswith("rankzero: ")]


def command_line(*args: str, ranks: int = 0, run: Path = RUN_SCRIPT, restarts: int = 0) -> list[str]:
    """The argv of a command: one process, or with `ranks` under torchrun, on a port of its own."""
    nproc, max_restarts = f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", nproc, max_restarts]
    return [sys.executable, *(torchrun if ranks else []), str(run), *args]


def rankzero(*args: str, ranks: int = 0) -> list[str]:
    """The argv of `rankzero COMMAND ...`: one process, or with `ranks` under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks else []), "-m", "launch", *args]


def start_command(
    *args: str, cwd: Path, ranks: int = 0, restarts: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `launch/run.py` in a process group of its own, without variables of a launcher around pytest."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", FOLDER_VARIABLE: str(cwd)}
    return subprocess.Popen(
        command_line(*args, ranks=ranks, restarts=restarts),
        cwd=cwd,
        env={**clean, **ours, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_command(process: subprocess.Popen[str], timeout: float = COMMAND_TIMEOUT_S) -> CommandResult:
    """Wait for the end of a started command; after `timeout` seconds kill its process group and fail."""
    started_at, cpu_before = time.monotonic(), children_cpu_seconds()
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout:g} s\n{stdout}\n{stderr}") from None
    seconds = time.monotonic() - started_at
    return CommandResult(process.returncode, stdout, stderr, seconds, children_cpu_seconds() - cpu_before)


def run_command(
    *args: str,
    cwd: Path,
    ranks: int = 0,
    env: Mapping[str, str] | None = None,
    timeout: float = COMMAND_TIMEOUT_S,
) -> CommandResult:
    """Run `launch/run.py` to its end."""
    return wait_for_command(start_command(*args, cwd=cwd, ranks=ranks, env=env), timeout)


def children_cpu_seconds() -> float:
    """Processor time of all child processes that have been waited for so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def descendants(cwd: Path) -> list[psutil.Process]:
    """The living processes of the commands in `cwd`, also those in other sessions (torchrun's workers)."""
    alive = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(FOLDER_VARIABLE) == str(cwd)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.Error:  # ended meanwhile, or of another user
            continue
    return alive
