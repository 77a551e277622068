"""Lives of a run: `run.py` started as a user starts it, watched, and killed at the right moment. Imports no
torch.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from launch.checkpoint.directory import checkpoints_dir, list_checkpoints, step_of
from launch.equivalence.common import command

PATIENCE = 900.0
"""seconds without a new line of metrics.jsonl after which a life is taken for hung: beyond any step, start or
evaluation
"""
TICK = 0.001
"""seconds between two looks at a life: a small checkpoint is written in ten times that"""
CENSUS = 0.5
"""seconds between two counts of its processes, which cost ten looks each"""


class Layout(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.ranks}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a life ended."""

    how: Literal["by itself", "killed", "hung"]
    code: int
    """the exit code; that of a kill says nothing"""
    began: float
    """seconds since the epoch"""
    seconds: float
    log: Path
    """all that it said"""

    @property
    def trouble(self) -> str:
        """What is wrong with how it ended, in words; empty if nothing is."""
        if self.how == "hung":
            return f"no step for {PATIENCE:g} s, so it was killed"
        return f"exit code {self.code}" if self.how == "by itself" and self.code else ""

    def last_words(self, most: int = 30) -> list[str]:
        """What it said last: from our own verdict on, if there is one."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        verdict = next(
            (index for index, line in enumerate(lines) if line.startswith("rankzero: ")), len(lines) - most
        )
        return lines[max(verdict, 0) :][:most]


def run_process(
    words: Sequence[str],
    layout: Layout,
    *,
    run_dir: Path,
    environment: Mapping[str, str],
    kill_when: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run `words` in `run_dir`, to its end or until `kill_when`, which is asked a thousand times a second.

    What it says goes to a file beside `run_dir`. None of its processes is left, however this function ends.
    """
    metrics, log = run_dir / "metrics.jsonl", run_dir.with_name(run_dir.name + ".log")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    began, start = time.time(), time.monotonic()
    with log.open("w") as file:
        process = psutil.Popen(
            [*command("run.py", layout.ranks), *words, f"strategy={layout.strategy}", f"run_dir={run_dir}"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to hear, and theirs to feel through us
        )
    how: Literal["by itself", "killed", "hung"] = "by itself"
    family: list[psutil.Process] = []
    counted, size, moved = 0.0, 0, start
    try:
        while process.poll() is None:
            if kill_when():
                how = "killed"
                break
            if (now := time.monotonic()) - counted > CENSUS:
                family, counted = children(process), now
                if (grown := size_of(metrics)) != size:
                    size, moved = grown, now
                if now - moved > PATIENCE:
                    how = "hung"
                    break
            time.sleep(TICK)
    finally:
        kill(process, family)
    return Ended(how=how, code=process.returncode, began=began, seconds=time.monotonic() - start, log=log)


def kill(process: psutil.Popen, family: Sequence[psutil.Process] = ()) -> None:
    """`kill -9` for a process and all that it has started, torchrun's workers with their own sessions among
    them.

    `family` is who was known last: they go first, without the time that a new count takes. The one that
    started them is stopped meanwhile, to start no others and tell nobody off.
    """
    with suppress(psutil.NoSuchProcess):
        process.suspend()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    found = [*family, *children(process)]
    for member in [*found, process]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(found, timeout=60)


def children(process: psutil.Popen) -> list[psutil.Process]:
    """All that a process has started, directly or not, and that still is."""
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# what a run directory tells ---------------------------------------------------------------------------------


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut off."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def last_step(run_dir: Path) -> int:
    """The newest step that metrics.jsonl knows of."""
    return next((int(line["step"]) for line in lines_of(run_dir)[::-1]), 0)


def step_seconds(run_dir: Path) -> float:
    """Seconds that a step takes: the shortest of the newest few, as there may be a resumption between two; 0
    if unknown.
    """
    times = [line["time"] for line in lines_of(run_dir) if "time" in line][-4:]
    return max(min((after - before for before, after in pairwise(times)), default=0.0), 0.0)


def saved_step(run_dir: Path) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    return max(map(step_of, list_checkpoints(run_dir)), default=0)


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint has been begun and not committed."""
    return any(checkpoints_dir(run_dir).glob(".step-*.partial"))


def resumed_at(run_dir: Path, life: Ended) -> int:
    """The step that a life went on from, by its own lines: those that are newer than itself."""
    return (
        min((line["step"] for line in lines_of(run_dir) if line.get("time", 0) >= life.began), default=1) - 1
    )
