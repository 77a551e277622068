"""Resume: find the newest checkpoint, verify it, check that it is of the same run, load it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from launch.checkpoint.directory import (
    checkpoints_dir,
    list_checkpoints,
    list_step_folders,
    quarantine,
    step_of,
)
from launch.checkpoint.manifest import MANIFEST_NAME
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume_compatibility import check_compatible
from launch.runtime.collectives import barrier, broadcast_object, first_error
from launch.runtime.restarts import restart_count
from launch.runtime.world import World
from launch.state.run import Run


def resume(run: Run, run_dir: Path) -> Path | None:
    """Continue `run` from the checkpoint that `resume=` asks for.

    Returns the folder of that checkpoint; None if there is none, and the run begins anew. Collective. Raises
    ValueError, on all ranks, if the checkpoints are damaged or belong to another run.
    """
    candidates = find(run.config.resume, run_dir, run.world)
    if not candidates:
        barrier()  # rank zero may create what the others have just looked for
        return None
    with open_verified(candidates, run_dir, run.world, run.phase.tick) as checkpoint:
        check_compatible(checkpoint, run)
        load(checkpoint, run)
    return checkpoint.folder


# find -------------------------------------------------------------------------------------------------------


def find(wanted: str, run_dir: Path, world: World) -> list[Path]:
    """The checkpoints that `resume=wanted` allows, in the order to be tried; the same on all ranks.

    Collective: it counts what rank zero sees, as another node may see a shared folder a little later. Raises
    ValueError, on all ranks, if `wanted` is a path without a checkpoint.
    """
    candidates: list[str] = []
    error = ""
    if world.rank == 0:
        try:
            candidates = [str(folder) for folder in find_locally(wanted, run_dir)]
        except ValueError as mistake:
            error = str(mistake)
    if error := first_error(error):
        raise ValueError(error)
    return [Path(folder) for folder in broadcast_object(candidates)]


def find_locally(wanted: str, run_dir: Path) -> list[Path]:
    """`find` as this process sees the files.

    After a restart the run continues from its own checkpoints, if it has any, whatever it began from.
    """
    if wanted == "auto" or (restart_count(os.environ) and list_checkpoints(run_dir)):
        return list_step_folders(run_dir)[::-1]  # one without a manifest has lost it: damaged, not absent
    if wanted == "none":
        return []
    path = Path(wanted)
    candidates = [path] if (path / MANIFEST_NAME).is_file() else list_checkpoints(path)[::-1]
    if not candidates:
        raise ValueError(
            f"resume={wanted} is not a checkpoint: it has no {MANIFEST_NAME}, "
            "and no checkpoints/step-*/ with one"
        )
    newer = [other for other in list_checkpoints(run_dir) if step_of(other) > step_of(candidates[0])]
    if newer and candidates[0].resolve().parent == checkpoints_dir(run_dir).resolve():
        raise ValueError(
            f"resume={wanted} is not the newest of its run: going back in run_dir={run_dir} would mix two "
            f"runs; choose another run_dir, or remove {newer[0]} and what follows it"
        )
    return candidates


# verify -----------------------------------------------------------------------------------------------------


def open_verified(
    candidates: list[Path], run_dir: Path, world: World, on_progress: Callable[[int], object]
) -> Checkpoint:
    """The first of `candidates` that is intact, open on all ranks.

    Rank zero reports damaged ones, and quarantines those of this run. Collective. Raises ValueError, on all
    ranks, if all are damaged: a run must not begin anew over them.
    """
    for folder, next_one in zip(candidates, [*candidates[1:], None], strict=True):
        checkpoint, error = verify(folder, world, on_progress)
        if checkpoint is not None:
            return checkpoint
        if next_one is None:
            break
        if world.rank == 0:
            print(f"rankzero: {error}; going back to {next_one}", file=sys.stderr, flush=True)
            if folder.parent == checkpoints_dir(run_dir):
                quarantine(folder)
    raise ValueError(
        f"{error}; no intact checkpoint is left to continue from. To start afresh, say another run_dir= "
        "(nothing in this one was touched)"
    )


def verify(folder: Path, world: World, on_progress: Callable[[int], object]) -> tuple[Checkpoint | None, str]:
    """The checkpoint in `folder`, open, if no rank finds it damaged; else None and what the first rank found.

    Each rank hashes its part of the files, so that each file is read once, whatever the world size.
    Collective.
    """
    checkpoint, error = None, ""
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify_sizes()
        files = range(world.rank, len(checkpoint.manifest.files), world.world_size)
        checkpoint.verify(files, on_progress)
    except ValueError as damage:
        error = str(damage)
    error = first_error(error)
    if error and checkpoint is not None:
        checkpoint.close()
    return (None if error else checkpoint), error


# load -------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, run: Run) -> None:
    """Load the models, the optimizers and the training state. Collective."""
    for name, strategy in run.strategies.items():
        strategy.load_state(checkpoint.of(name))
    run.progress.load_state(checkpoint.manifest.progress)
