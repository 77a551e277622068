"""What the run directory of a running or killed run shows: its metrics, its steps, its checkpoints. Imports
no torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.checkpoint.directory import checkpoints_dir, list_checkpoints, step_of
from launch.equivalence.subprocesses import ProcessResult

STEPS_TIMED = 3
"""the newest, of which the shortest tells how long a step takes"""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut off by a kill; none without the file."""
    lines = []
    with suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def last_logged_step(run_dir: Path) -> int:
    """The step of the newest line of metrics.jsonl; 0 without one."""
    lines = read_metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def step_seconds(run_dir: Path) -> float:
    """Seconds that a step takes: the shortest of the newest few, as a resume may lie between two; 0 if
    unknown.
    """
    times = [line["time"] for line in read_metrics(run_dir) if "time" in line][-STEPS_TIMED - 1 :]
    return max(min((after - before for before, after in pairwise(times)), default=0.0), 0.0)


def last_saved_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return max(map(step_of, list_checkpoints(run_dir)), default=0)


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint has been begun and is not complete."""
    return any(checkpoints_dir(run_dir).glob(".step-*.partial"))


def resumed_from(run_dir: Path, result: ProcessResult) -> int:
    """The step that a run continued from, by its own lines of metrics.jsonl: those that are newer than its
    start.
    """
    own_steps = [line["step"] for line in read_metrics(run_dir) if line.get("time", 0) >= result.started]
    return min(own_steps, default=1) - 1
