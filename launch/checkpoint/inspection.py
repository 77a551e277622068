"""The checkpoints of a run: list, inspect, verify, compare, export and prune them, as `rankzero ckpt` does.

Each function prints, and returns the exit code; ValueError is a mistake of the user's. No torch at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.filesize import decimal

from launch.checkpoint import directory
from launch.checkpoint.ckpt_output import (
    CheckpointRemoved,
    find_checkpoint,
    open_checkpoint,
    print_table,
    progress_bar,
    report_removal,
)
from launch.checkpoint.describe import (
    examine,
    overview,
    summarize_checkpoints,
    tensor_rows,
    writer_text,
)
from launch.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, Manifest
from launch.cli.keys import flatten, format_value
from launch.runtime.wording import plural

if TYPE_CHECKING:
    from launch.checkpoint.compare import Change, CheckpointDifference

DIFF_LINES = 20
"""changes and tensors that `diff` prints"""


def list_run(run: Path) -> int:
    """Print the checkpoints of a run."""
    if not directory.checkpoints_dir(run).is_dir():
        raise ValueError(
            f"{run} is not a run: it has no checkpoints/; give the folder above it, such as runs/NAME/TIME"
        )
    if summaries := list(summarize_checkpoints(run)):
        print_table(("checkpoint", "saved", ">size", "written by", "files", "notes"), summaries)
    else:
        print(f"{run} has no checkpoint yet")
    return 0


def inspect(path: Path) -> int:
    """Print what is in a checkpoint."""
    with report_removal(find_checkpoint(path)) as folder:
        manifest = Manifest.read(folder)
        lines = list(overview(folder, manifest))
    print(folder)
    for name, value in lines:
        print(f"  {name:<10}{value}")
    columns = ("", ">tensors", ">elements", ">size", "dtype", ">fragments each")
    print_table(columns, list(tensor_rows(manifest)))
    print("configuration")
    for key, value in flatten(manifest.config):
        print(f"  {key}={format_value(value)}")
    return 0


def verify(path: Path) -> int:
    """Read every byte of a checkpoint, or of all checkpoints of a run, and compare the digests."""
    if (path / MANIFEST_NAME).is_file():
        return verify_checkpoint(path)
    codes = []
    for folder in directory.list_checkpoints(path) or [find_checkpoint(path)]:
        try:
            codes.append(verify_checkpoint(folder))
        except CheckpointRemoved as error:
            print(error)
    return max(codes, default=1)


def verify_checkpoint(folder: Path) -> int:
    """The exit code for one checkpoint; prints each file that is damaged."""
    damages = []
    try:
        with open_checkpoint(folder) as checkpoint:
            manifest = checkpoint.manifest
            with progress_bar(folder.name, manifest.size) as on_progress:
                for index in range(len(manifest.files)):
                    try:
                        checkpoint.verify([index], on_progress)
                    except DamagedCheckpoint as error:
                        if not folder.exists():
                            raise
                        damages.append(str(error))
    except DamagedCheckpoint as error:  # its manifest
        damages.append(str(error))
    for damage in damages:
        print(damage)
    if damages:
        return 1
    print(f"{folder} is intact: {plural(len(manifest.files), 'file')}, {decimal(manifest.size)}")
    return 0


def diff(a: Path, b: Path, *, all: bool = False) -> int:
    """Print where two checkpoints differ; returns 1 if their state does."""
    from launch.checkpoint.compare import comparable_tensors, compare_checkpoints

    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        names = comparable_tensors(first.manifest, second.manifest)
        size = sum(first.manifest.tensors[name].nbytes for name in names)
        with progress_bar("comparing", size) as on_progress:
            difference = compare_checkpoints(first, second, on_progress)
        for letter, side in (("A", first), ("B", second)):
            print(f"{letter}  {side.folder}  step {side.manifest.step}, {writer_text(side.manifest)}")
    limit = None if all else DIFF_LINES
    print_changes("configuration", difference.config, limit)
    print_changes("optimizers", difference.optimizers, limit)
    print_changes("tensors", difference.specs, limit)
    print_values(difference, limit)
    return 0 if difference.same_state else 1


def print_changes(what: str, changes: Sequence[Change], limit: int | None) -> None:
    """The first `limit` changes, and how many more there are."""
    if changes:
        print(f"\n{what}: {len(changes)} differ")
    for name, old, new in changes[:limit]:
        print(f"  {name}  {format_value(old)} -> {format_value(new)}")
    if limit is not None and len(changes) > limit:
        print(f"  and {len(changes) - limit} more; all=true shows them")


def print_values(difference: CheckpointDifference, limit: int | None) -> None:
    """A table of the first `limit` tensors whose values differ, and how many more there are."""
    differing = difference.values
    print(f"\nvalues: {plural(difference.equal_count, 'tensor')} equal, {len(differing)} differ")
    rows = [
        (f"{each.max_abs:.3g}", f"{each.max_rel:.2g}", f"{each.num_different:,} of {each.numel:,}", each.name)
        for each in differing[:limit]
    ]
    if rows:
        print_table((">max abs", ">max rel", ">elements", "tensor"), rows)
    if len(rows) < len(differing):
        print(f"and {len(differing) - len(rows)} more; all=true shows them")


def export(
    path: Path,
    *,
    to: str = "",
    model: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_gb: float = 5.0,
) -> int:
    """Write the weights of a checkpoint as plain safetensors files."""
    from launch.checkpoint.export import export_weights, files_with, weights_of

    target = check_export_path(to)
    with open_checkpoint(path) as checkpoint:
        manifest = checkpoint.manifest
        models = [model] if model else checkpoint.models
        weights = weights_of(manifest, models, dtype)
        to_verify = files_with(manifest, weights.values())
        with progress_bar("verifying", sum(manifest.files[index].size for index in to_verify)) as on_progress:
            checkpoint.verify(to_verify, on_progress)
        size = sum(weight.nbytes for weight in weights.values())
        with progress_bar("writing", size) as on_progress:
            files = export_weights(
                checkpoint,
                target,
                models=models,
                dtype=dtype,
                shard_bytes=int(shard_gb * 1e9),
                on_progress=on_progress,
            )
    names = ", ".join(str(file) for file in files)
    print(f"{plural(len(weights), 'tensor')} of step {manifest.step}, {decimal(size)}, in {names}")
    target_model = "model" if len(models) == 1 else "torch.nn.ModuleDict(models)"
    print(f"load with: {how_to_load(files[-1], target_model)}")
    return 0


def check_export_path(to: str) -> Path:
    """Where to export to. Raises ValueError if nothing can be written there."""
    from launch.checkpoint.export import HOW_TO_CONVERT, SUFFIX, existing_export

    path = Path(to)
    if path.suffix in (".pt", ".pth", ".bin"):
        safetensors = path.with_suffix(SUFFIX)
        raise ValueError(
            f"to={to}: weights are exported as {SUFFIX}; write to={safetensors}, then convert it with "
            f"{HOW_TO_CONVERT.format(safetensors, path)}"
        )
    if path.suffix != SUFFIX:
        raise ValueError(
            f"to={to} must name a file to write that ends in {SUFFIX}, such as to=weights{SUFFIX}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"to={to}: there is no folder {path.parent}")
    if existing := existing_export(path):
        raise ValueError(
            f"to={to}: {existing[0]} exists already, and is not overwritten; remove it or choose another name"
        )
    return path


def how_to_load(path: Path, model: str) -> str:
    """The line of Python that loads what was exported into `model`."""
    if path.suffix == ".json":
        return f'accelerate.load_checkpoint_in_model({model}, "{path}")'
    return f'safetensors.torch.load_model({model}, "{path}")'


def prune(run: Path, *, keep: int) -> int:
    """Remove all but the newest checkpoints of a run, and the best if the run keeps it."""
    if not (folders := directory.list_checkpoints(run)):
        raise ValueError(f"{run} is not a run that has checkpoints; give the folder above its checkpoints/")
    newest = folders[-keep:]
    best_step = best_step_to_keep(newest, keep)
    try:
        removed = directory.prune(run, keep, best_step)
    except FileNotFoundError:
        raise CheckpointRemoved(
            f"the run removes checkpoints of {run} itself at this moment; try again"
        ) from None
    for folder in folders:
        if folder in removed or not folder.exists():
            print(f"removed {folder}")
        elif folder in newest:
            print(f"kept    {folder}")
        elif directory.step_of(folder) == best_step:
            print(f"kept    {folder}, the best")
        else:
            print(f"kept    {folder}, a process reads it")
    return 0


def best_step_to_keep(newest: Sequence[Path], keep: int) -> int | None:
    """The step of the best evaluation, if the run keeps that checkpoint.

    Raises ValueError if all of the `newest` checkpoints are damaged: a run could not continue from them.
    """
    examined = [examine(folder) for folder in newest]
    intact = [manifest for manifest, error in examined if manifest and not error]
    if not intact:
        raise ValueError(
            f"keep={keep} would keep no intact checkpoint ({examined[-1][1]}); "
            "`list` says which are complete: keep more"
        )
    keeps_best = intact[-1].config.get("checkpoint", {}).get("best")
    return intact[-1].progress.get("best_step") if keeps_best else None
