"""Which checkpoint a run goes on from, and whether it may: whole, and of the same run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.checkpoint.directory import checkpoints_dir, list_checkpoints, list_named, quarantine, step_of
from launch.checkpoint.manifest import NAME, Manifest
from launch.checkpoint.reader import Checkpoint
from launch.cli.config import flatten, nested
from launch.runtime.collectives import barrier, broadcast_object, first_error
from launch.runtime.restarts import restart_count
from launch.runtime.text import shape_text
from launch.state.run import Run

MAY_CHANGE = {
    *("config", "run_dir", "resume", "init", "init_partial", "debug", "workers"),
    *("launcher", "max_time", "start_timeout", "hang_timeout", "chaos"),
    *("strategy", "steps", "epochs", "micro_batch_size", "activation_checkpointing", "compile"),
    *("ddp", "fsdp", "zero", "checkpoint", "eval", "log"),
}
"""keys, and groups of keys, that do not change what is computed, or only how far"""


def resume(run: Run, run_dir: Path) -> Path | None:
    """Continue `run` from the checkpoint that `resume` asks for. Returns its folder; None if there is none to
    continue from.

    All ranks call it. Raises ValueError if what is there is damaged or belongs to another run.
    """
    checkpoint = find(run, run_dir)
    if checkpoint is None:
        return None
    with checkpoint:
        refuse_changes(run, checkpoint)
        for name, strategy in run.strategies.items():
            strategy.load_state(checkpoint.of(name))
        run.progress.load_state(checkpoint.manifest.progress)
    return checkpoint.folder


# which one --------------------------------------------------------------------------------------------------


def find(run: Run, run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, open on all ranks; damaged ones are told of, and set aside if they
    are the run's.
    """
    own = checkpoints_dir(run_dir)
    # what rank zero sees: another node may see a shared folder a little later
    candidates, problem = [], ""
    if run.world.rank == 0:
        try:
            candidates = [str(path) for path in asked_for(run.config.resume, run_dir)]
        except ValueError as error:
            problem = str(error)
    if problem := first_error(problem):
        raise ValueError(problem)
    candidates = broadcast_object(candidates)
    for index, folder in enumerate(map(Path, candidates)):
        checkpoint, problem = opened(folder, run)
        if checkpoint is not None:
            return checkpoint
        if index + 1 == len(candidates):
            raise ValueError(
                f"{problem}; no whole checkpoint is left to continue from. To start afresh, say another run_dir= "
                "(nothing in this one was touched)"
            )
        if run.world.rank == 0:
            print(f"rankzero: {problem}; going back to {candidates[index + 1]}", file=sys.stderr, flush=True)
            if folder.parent == own:
                quarantine(folder)
    barrier()
    return None


def asked_for(wanted: str, run_dir: Path) -> list[Path]:
    """The checkpoints that may be taken, the best first. A life after the first goes on from the run's own,
    if it has any.
    """
    if wanted == "auto" or (restart_count(os.environ) and list_checkpoints(run_dir)):
        return list_named(run_dir)[::-1]  # one without a manifest has lost it: it is told of, not passed over
    if wanted == "none":
        return []
    path = Path(wanted)
    found = [path] if (path / NAME).is_file() else list_checkpoints(path)[::-1]
    if not found:
        raise ValueError(
            f"resume={wanted} is not a checkpoint: it has no {NAME}, and no checkpoints/step-*/ with one"
        )
    newer = [other for other in list_checkpoints(run_dir) if step_of(other) > step_of(found[0])]
    if newer and found[0].resolve().parent == checkpoints_dir(run_dir).resolve():
        raise ValueError(
            f"resume={wanted} is not the newest of its run: going back in run_dir={run_dir} would mix two runs; "
            f"choose another run_dir, or remove {newer[0]} and what follows it"
        )
    return found


def opened(folder: Path, run: Run) -> tuple[Checkpoint | None, str]:
    """The checkpoint in `folder`, if all ranks find it whole; else what the first rank found wrong.

    Each rank hashes its share of the files, so that each file is read once, whatever the world size.
    """
    checkpoint, problem = None, ""
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify_sizes()
        mine = range(run.world.rank, len(checkpoint.manifest.files), run.world.world_size)
        checkpoint.verify(mine, run.phase.tick)
    except ValueError as error:
        problem = str(error)
    problem = first_error(problem)
    if problem and checkpoint is not None:
        checkpoint.close()
    return (None if problem else checkpoint), problem


# whether it may ---------------------------------------------------------------------------------------------


def refuse_changes(run: Run, checkpoint: Checkpoint) -> None:
    """Raise ValueError with what has changed since the checkpoint, if the curve would not continue."""
    manifest, folder = checkpoint.manifest, checkpoint.folder
    if manifest.config["recipe"] != run.config.recipe:
        raise ValueError(
            f"{folder} belongs to recipe={manifest.config['recipe']}, not {run.config.recipe}; choose another run_dir"
        )
    changes = [*changed_keys(manifest, run), *changed_code(checkpoint, run)]
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise ValueError(
            f"{folder} was saved by another run than this, and the curve would not continue: {shown}. "
            f"Put it back, or start a new run (another run_dir) from its weights alone: init={folder}"
        )


def changed_keys(manifest: Manifest, run: Run) -> Iterator[str]:
    """The keys of the command line that are not what they were. A key that one of the two does not know is
    passed over.
    """
    allowed = MAY_CHANGE | set(run.recipe.resume_may_change)
    before, now = dict(flatten(manifest.config)), dict(flatten(nested(run.config) | nested(run.recipe)))
    for name in now:
        if name in before and before[name] != now[name] and not {name, name.partition(".")[0]} & allowed:
            yield f"{name}={before[name]}, now {now[name]}"
    if manifest.train_samples != len(run.splits.train):
        yield f"{manifest.train_samples:,} training samples, now {len(run.splits.train):,}"


def changed_code(checkpoint: Checkpoint, run: Run) -> Iterator[str]:
    """What is different in the models and optimizers that the recipe builds."""
    saved = set(checkpoint.models)
    for model, strategy in run.strategies.items():
        before = (
            {n: s for n, s in checkpoint.of(model).shapes.items() if n.startswith("model/")}
            if model in saved
            else {}
        )
        now = {name: shape for name, shape in strategy.shapes().items() if 0 not in shape}
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                yield f"{model} {name.removeprefix('model/')}: {shape_or_absent(before.get(name))}, now {shape_or_absent(now.get(name))}"
        yield from changed_groups(model, checkpoint.manifest.optimizers.get(model, []), strategy.groups)


def changed_groups(model: str, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """What is different in the parameter groups of one optimizer."""
    if len(before) != len(now):
        yield f"{model}: {len(before)} parameter groups, now {len(now)}"
        return
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        where = f"{model} optimizer" + (f" group {index}" if len(now) > 1 else "")
        if old["optimizer"] != new["optimizer"]:
            yield f"{where}: {old['optimizer']}, now {new['optimizer']}"
            continue
        if old["parameters"] != new["parameters"]:
            yield f"{where} has other parameters"
        for key, value in new["settings"].items():
            if key in old["settings"] and old["settings"][key] != value:
                yield f"{where} {key}: {old['settings'][key]}, now {value}"


def shape_or_absent(shape: tuple[int, ...] | None) -> str:
    """A shape, or that there is none."""
    return "not there" if shape is None else shape_text(shape)
