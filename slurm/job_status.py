"""What SLURM says of a job that was submitted, and what its runs have written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUNNING_STATES = {
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING"),
    *("SIGNALING", "STOPPED"),
}
"""states of a job that has not ended"""
POLL_S = 2.0
"""seconds between questions to SLURM, whose controller serves everybody"""
OUTCOMES = {
    "failure.json": "failed",
    "stopped.json": "stopped, to be continued",
    "model.safetensors": "done",
}
"""files of a run directory that tell how the run ended, in this order"""


@dataclass(frozen=True)
class JobState:
    """A job, or a task of an array, as squeue shows it."""

    job: str
    state: str
    elapsed: str
    nodes: str
    reason: str
    """why it waits"""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run any more."""
        return self.state not in RUNNING_STATES


def call_slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises ValueError with what it complains of."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} here: run this where SLURM is, or add dry_run=true"
        ) from None
    if ended.returncode:
        raise ValueError(ended.stderr.strip() or f"{command[0]} ended with {ended.returncode}")
    return ended.stdout.strip()


def query_job(job_id: str) -> list[JobState]:
    """What SLURM knows of a job, or of each task of an array; empty when it has forgotten it."""
    columns = "--format=%i|%T|%M|%N|%r"
    try:
        listed = call_slurm("squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", columns)
    except ValueError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [JobState(*line.split("|")) for line in listed.splitlines()]


def follow_job(job_id: str, folder: Path) -> int:
    """Print what a job prints until it has ended; returns 0 if it succeeded, 130 after Ctrl-C."""
    offsets: dict[str, int] = {}
    before = ""
    try:
        while True:
            tasks = query_job(job_id)
            waiting = {f"{task.state} ({task.reason})" for task in tasks if task.state == "PENDING"}
            states = ", ".join(sorted(waiting))
            if states and states != before:
                print(f"rankzero: job {job_id} is {states}", file=sys.stderr, flush=True)
            before = states
            for text in new_output(folder, job_id, offsets):
                print(text, end="", flush=True)
            if all(task.has_ended for task in tasks):
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nrankzero: job {job_id} goes on; rankzero submit cancel {folder} ends it", file=sys.stderr)
        return 130
    states = ", ".join(sorted({task.state for task in tasks})) or "gone"
    print(f"rankzero: job {job_id} is {states}", file=sys.stderr)
    return int(any(task.state != "COMPLETED" for task in tasks))


def new_output(folder: Path, job_id: str, offsets: dict[str, int]) -> Iterator[str]:
    """What the job's output files have got since the last call, which `offsets` remembers."""
    for path in sorted(folder.glob(f"slurm-{job_id}*.out")):
        with path.open("rb") as file:
            file.seek(offsets.get(path.name, 0))
            content = file.read()
            offsets[path.name] = file.tell()
        yield content.decode(errors="replace")


def run_progress(folder: Path) -> str:
    """How far a run is, by its own files: `step 20, loss 1.234, done`."""
    outcome = next((text for name, text in OUTCOMES.items() if (folder / name).is_file()), "")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # it is being written
            continue
        if "loss" in record:
            return f"step {record['step']}, loss {record['loss']:.4g}{f', {outcome}' if outcome else ''}"
    return outcome or "no step yet"
