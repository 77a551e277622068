"""The checkpoints of a run: their folders, and retention (the newest N are kept). Imports no torch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from launch.checkpoint.manifest import MANIFEST_NAME
from launch.runtime.files import remove_unless_held

STEP_FOLDER = re.compile(r"step-(\d{8,})")
NO_STEP = -1
DAMAGED_SUFFIX = ".damaged"
"""a damaged checkpoint is renamed to end in it, in case that somebody can still use a part of it"""


def checkpoints_dir(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def partial_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is being written: it starts with a dot."""
    return checkpoints_dir(run_dir) / f".step-{step:08d}.partial"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint; NO_STEP if it has another name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else NO_STEP


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first. Whether they are undamaged is not looked at."""
    return [path for path in list_step_folders(run_dir) if (path / MANIFEST_NAME).is_file()]


def list_step_folders(run_dir: Path) -> list[Path]:
    """All that has the name of a checkpoint, with a manifest or without, oldest first."""
    if not checkpoints_dir(run_dir).is_dir():
        return []
    folders = [path for path in checkpoints_dir(run_dir).iterdir() if step_of(path) != NO_STEP]
    return sorted(folders, key=step_of)


def list_quarantined(run_dir: Path) -> list[Path]:
    """The damaged checkpoints that `quarantine` has renamed."""
    return sorted(checkpoints_dir(run_dir).glob(f"step-*{DAMAGED_SUFFIX}"))


def prune(run_dir: Path, keep: int, best_step: int | None = None) -> list[Path]:
    """Retention: keep the newest `keep` checkpoints and that of `best_step`, remove the others.

    A checkpoint that a process reads is kept, too. Returns those that were removed.
    """
    assert keep > 0
    return [
        folder
        for folder in list_checkpoints(run_dir)[:-keep]
        if step_of(folder) != best_step and remove_unless_held(folder, MANIFEST_NAME)
    ]


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is no longer listed; returns its new name."""
    renamed = folder.with_name(folder.name + DAMAGED_SUFFIX)
    shutil.rmtree(renamed, ignore_errors=True)
    return folder.rename(renamed)


def remove_partial(run_dir: Path) -> None:
    """Remove what is left of saves and removals that ended with their process."""
    for path in checkpoints_dir(run_dir).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
