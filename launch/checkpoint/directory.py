"""The checkpoints of a run: which there are, which are kept. Imports no torch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from launch.checkpoint.manifest import NAME
from launch.runtime.files import remove_unless_held

FOLDER = re.compile(r"step-(\d{8,})")
NO_STEP = -1
DAMAGED = ".damaged"
"""a damaged checkpoint is set aside under this suffix, in case that somebody can still use a part of it"""


def checkpoints_dir(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint; NO_STEP if it has another name."""
    match = FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else NO_STEP


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first; whether they are still whole is another question."""
    return [path for path in list_named(run_dir) if (path / NAME).is_file()]


def list_named(run_dir: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    if not checkpoints_dir(run_dir).is_dir():
        return []
    return sorted(
        (path for path in checkpoints_dir(run_dir).iterdir() if step_of(path) != NO_STEP), key=step_of
    )


def prune(run_dir: Path, keep: int, also: int | None = None) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and that of step `also`; returns which. What somebody
    reads stays.
    """
    assert keep > 0
    return [
        folder
        for folder in list_checkpoints(run_dir)[:-keep]
        if step_of(folder) != also and remove_unless_held(folder, NAME)
    ]


def quarantine(folder: Path) -> Path:
    """Take a damaged checkpoint out of the row; returns its new name."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def remove_partial(run_dir: Path) -> None:
    """Remove what saves and removals left that were cut off by the end of their process."""
    for path in checkpoints_dir(run_dir).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
