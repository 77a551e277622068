"""The real command in processes of its own: started as a user starts it, watched, and killed at the right
moment. Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

HANG_TIMEOUT_S = 900.0
"""without a new line of metrics.jsonl, after which a run counts as hung: any step or evaluation is shorter"""
POLL_S = 0.001
"""between two looks at a run: a small checkpoint is written in ten times that"""
SCAN_S = 0.5
"""between two scans of the processes that a run has started, which cost as much as ten looks each"""
MAX_ERROR_LINES = 30
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
)
"""by which a launcher gives a process its rank: one around the command must not do so for its runs"""

EndReason = Literal["exited", "killed", "hung"]


class RankLayout(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.ranks}"


@dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """A run that has ended."""

    reason: EndReason
    exit_code: int
    """that of a killed run says nothing"""
    started: float
    """seconds since the epoch"""
    seconds: float
    log: Path
    """its stdout and stderr"""

    @property
    def problem(self) -> str:
        """What is wrong with how it ended; empty if nothing is."""
        if self.reason == "hung":
            return f"no step for {HANG_TIMEOUT_S:g} s, so it was killed"
        return f"exit code {self.exit_code}" if self.reason == "exited" and self.exit_code else ""

    def error_lines(self, limit: int = MAX_ERROR_LINES) -> list[str]:
        """The end of its output: from rankzero's own failure report on, if there is one."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reports = [index for index, line in enumerate(lines) if line.startswith("rankzero: ")]
        first = reports[0] if reports else max(len(lines) - limit, 0)
        return lines[first:][:limit]


def subprocess_environment(ranks: int) -> dict[str, str]:
    """The environment of runs on at most so many ranks. Imports torch, to count the GPUs."""
    import torch

    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    # the same number of threads everywhere: sums are divided among them, and rounded differently otherwise
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if torch.cuda.device_count() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # fewer GPUs than ranks: all on the CPU
    return environment


def launch_command(program: str, ranks: int) -> list[str]:
    """How a user starts a file of `launch/`: under python, or on several ranks under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(Path(__file__).parents[1] / program)]


def run_process(
    argv: Sequence[str],
    layout: RankLayout,
    *,
    run_dir: Path,
    environment: Mapping[str, str],
    kill_when: Callable[[], bool] = lambda: False,
) -> ProcessResult:
    """Run `argv` in `run_dir`, to its end or until `kill_when()`, which is called a thousand times a second.

    Its output goes to a file beside `run_dir`. None of its processes is left, however this function ends.
    """
    log = run_dir.with_name(run_dir.name + ".log")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    started, start = time.time(), time.monotonic()
    with log.open("w") as file:
        process = psutil.Popen(
            [
                *launch_command("run.py", layout.ranks),
                *argv,
                f"strategy={layout.strategy}",
                f"run_dir={run_dir}",
            ],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then kills the run
        )
    reason = watch(process, run_dir / "metrics.jsonl", kill_when)
    return ProcessResult(
        reason=reason,
        exit_code=process.returncode,
        started=started,
        seconds=time.monotonic() - start,
        log=log,
    )


def watch(process: psutil.Popen, metrics: Path, kill_when: Callable[[], bool]) -> EndReason:
    """Wait until the process exits, `kill_when()` or no line of `metrics` comes; then none of its children is
    left.
    """
    descendants: list[psutil.Process] = []
    scanned, size, progressed = 0.0, 0, time.monotonic()
    try:
        while process.poll() is None:
            if kill_when():
                return "killed"
            if (now := time.monotonic()) - scanned > SCAN_S:
                descendants, scanned = descendants_of(process), now
                if (new_size := file_size(metrics)) != size:
                    size, progressed = new_size, now
                if now - progressed > HANG_TIMEOUT_S:
                    return "hung"
            time.sleep(POLL_S)
        return "exited"
    finally:
        kill_tree(process, descendants)


def kill_tree(process: psutil.Popen, known: Sequence[psutil.Process] = ()) -> None:
    """`kill -9` for a process and all that it has started, torchrun's workers with their own sessions among
    them.

    The `known` descendants go first, without the time that a new scan takes. The process that started them is
    suspended meanwhile, so that it starts no others and reports nothing.
    """
    with suppress(psutil.NoSuchProcess):
        process.suspend()
    kill_each(known)
    descendants = [*known, *descendants_of(process)]
    kill_each([*descendants, process])
    process.wait()
    psutil.wait_procs(descendants, timeout=60)


def kill_each(processes: Sequence[psutil.Process | psutil.Popen]) -> None:
    """`kill -9` for those of the processes that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def descendants_of(process: psutil.Popen) -> list[psutil.Process]:
    """The running processes that a process has started, directly or not."""
    try:
        descendants: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return descendants


def file_size(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
