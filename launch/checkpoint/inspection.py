"""Look into the checkpoints of a run, and take weights out of them.

    python launch/commands/ckpt.py list RUN            the checkpoints of a run
    python launch/commands/ckpt.py inspect PATH        what is in one: step, layout, sizes, configuration, versions
    python launch/commands/ckpt.py verify PATH         read every byte and compare the digests; of a run: of all its checkpoints
    python launch/commands/ckpt.py diff A B            keys, optimizers and tensors that differ; the tensors furthest apart first
        all=true                              every tensor that differs, not only the first 20
    python launch/commands/ckpt.py export PATH to=weights.safetensors
        to=FILE                               .safetensors, or .pt or .pth for torch.load; not yet there
        model=NAME                            one of several models (default: all of them, as MODEL.PARAMETER)
        dtype=fp32|bf16|fp16                  convert floating-point weights (default: as they are)
        shard_gb=5                            cut a larger file, and write an index as Hugging Face does
    python launch/commands/ckpt.py prune RUN keep=2    remove all but the newest 2 (and the best, if the run keeps it)

PATH, A and B are a checkpoint (runs/a/checkpoints/step-00000100) or a run (runs/a: its newest checkpoint).
Works while the run goes on, on any machine that sees its files, whatever the strategy and the number of ranks
that wrote them. Exit codes: 0 done, whole, the same; 1 damaged, or (diff) other tensors or optimizers; 2 a
mistake in the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from launch.checkpoint import console, describe, directory
from launch.checkpoint.console import find, opened, progress
from launch.checkpoint.manifest import NAME, DamagedCheckpoint, Manifest
from launch.cli.config import exit_with_mistake, flatten, show
from launch.runtime.text import plural

TOP = 20
"""tensors that `diff` shows"""


def main(words: list[str]) -> int:
    """Do what `words` say; returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        print((__doc__ or "").strip())
        return 0
    try:
        code = console.read(words, COMMANDS)()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DamagedCheckpoint, OSError) as error:  # no mistake of the user's
        print(f"rankzero: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        exit_with_mistake(error, 0)
    except KeyboardInterrupt:
        print("rankzero: interrupted", file=sys.stderr)
        return 130


# the commands: their paths, and behind the star their options -----------------------------------------------


def list_checkpoints(run: Path) -> int:
    """The checkpoints of a run."""
    if not directory.checkpoints_dir(run).is_dir():
        raise ValueError(
            f"{run} is not a run: it has no checkpoints/; give the folder above it, such as runs/NAME/TIME"
        )
    rows = list(describe.rows(run))
    if rows:
        console.table(("checkpoint", "saved", ">size", "written by", "files", "notes"), rows)
    else:
        print(f"{run} has no checkpoint yet")
    return 0


def inspect(path: Path) -> int:
    """What is in a checkpoint."""
    with console.unless_removed(find(path)) as folder:
        manifest = Manifest.read(folder)
        facts = list(describe.facts(folder, manifest))
    print(folder)
    for name, value in facts:
        print(f"  {name:<10}{value}")
    console.table(
        ("", ">tensors", ">elements", ">size", "type", ">pieces each"), list(describe.parts(manifest))
    )
    print("configuration")
    for key, value in flatten(manifest.config):
        print(f"  {key}={show(value)}")
    return 0


def verify(path: Path) -> int:
    """Whether each byte is what was written."""
    if (path / NAME).is_file():
        return verify_one(path)
    codes = []
    for folder in directory.list_checkpoints(path) or [find(path)]:
        try:
            codes.append(verify_one(folder))
        except console.Removed as error:
            print(error)
    return max(codes, default=1)


def verify_one(folder: Path) -> int:
    """The exit code for one checkpoint; names each file that is damaged."""
    problems = []
    try:
        with opened(folder) as checkpoint, progress(folder.name, checkpoint.manifest.size) as on_progress:
            for index in range(len(checkpoint.manifest.files)):
                try:
                    checkpoint.verify([index], on_progress)
                except DamagedCheckpoint as error:
                    if not folder.exists():
                        raise
                    problems.append(str(error))
    except DamagedCheckpoint as error:  # its manifest
        problems.append(str(error))
    for problem in problems:
        print(problem)
    if not problems:
        files = plural(len(checkpoint.manifest.files), "file")
        print(f"{folder} is whole: {files}, {decimal(checkpoint.manifest.size)}")
    return int(bool(problems))


def diff(a: Path, b: Path, *, all: bool = False) -> int:
    """Where two checkpoints differ."""
    from launch.checkpoint.compare import compare, shared

    with opened(a) as first, opened(b) as second:
        size = sum(
            describe.size(first.manifest.tensors[name]) for name in shared(first.manifest, second.manifest)
        )
        with progress("comparing", size) as on_progress:
            found = compare(first, second, on_progress)
        for letter, side in (("A", first), ("B", second)):
            print(f"{letter}  {side.folder}  step {side.manifest.step}, {describe.writer(side.manifest)}")
    for what, changes in (
        ("configuration", found.config),
        ("optimizers", found.optimizers),
        ("tensors", found.tensors),
    ):
        if changes:
            print(f"\n{what}: {len(changes)} differ")
        for name, old, new in changes if all else changes[:TOP]:
            print(f"  {name}  {show(old)} -> {show(new)}")
        if len(changes) > TOP and not all:
            print(f"  and {len(changes) - TOP} more; all=true shows them")
    print(f"\nvalues: {plural(found.equal, 'tensor')} equal, {len(found.apart)} differ")
    shown = found.apart if all else found.apart[:TOP]
    rows = [(f"{a.largest:.3g}", f"{a.relative:.2g}", f"{a.differ:,} of {a.numel:,}", a.name) for a in shown]
    if rows:
        console.table((">largest", ">relative", ">elements", "tensor"), rows)
    if len(shown) < len(found.apart):
        print(f"and {len(found.apart) - len(shown)} more; all=true shows them")
    return int(not found.same_state)


def export(
    path: Path,
    *,
    to: str = "",
    model: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_gb: float = 5.0,
) -> int:
    """Weights as plain files."""
    from launch.checkpoint.export import export_weights, files_with, weights_of

    target = new_file(to)
    if not 0 < shard_gb < 1e6:
        raise ValueError(f"shard_gb={shard_gb:g} must be a number of gigabytes, above 0")
    with opened(path) as checkpoint:
        models = [model] if model else checkpoint.models
        weights = weights_of(checkpoint.manifest, models, dtype)
        needed, size = (
            files_with(checkpoint.manifest, weights.values()),
            sum(weight.size for weight in weights.values()),
        )
        with progress(
            "verifying", sum(checkpoint.manifest.files[index].size for index in needed)
        ) as on_progress:
            checkpoint.verify(needed, on_progress)
        with progress("writing", size) as on_progress:
            files = export_weights(
                checkpoint,
                target,
                models=models,
                dtype=dtype,
                shard_bytes=int(shard_gb * 1e9),
                on_progress=on_progress,
            )
    tensors, names = plural(len(weights), "tensor"), ", ".join(map(str, files))
    print(f"{tensors} of step {checkpoint.manifest.step}, {decimal(size)}, in {names}")
    print(
        f"load with: {how_to_load(files[-1], 'model' if len(models) == 1 else 'torch.nn.ModuleDict(models)')}"
    )
    return 0


def prune(run: Path, *, keep: int) -> int:
    """Remove old checkpoints."""
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1: a run cannot go on without a checkpoint")
    if not (folders := directory.list_checkpoints(run)):
        raise ValueError(f"{run} is not a run that has checkpoints; give the folder above its checkpoints/")
    new = folders[-keep:]
    examined = [describe.examine(folder) for folder in new]
    if all(problem for _, problem in examined):
        raise ValueError(
            f"keep={keep} would keep nothing that is whole ({examined[-1][1]}); `list` says what is: keep more"
        )
    manifest = next(manifest for manifest, problem in reversed(examined) if manifest and not problem)
    best = manifest.progress.get("best_step") if manifest.config.get("checkpoint", {}).get("best") else None
    try:
        removed = directory.prune(run, keep, best)
    except FileNotFoundError:
        raise console.Removed(
            f"the run removes checkpoints of {run} itself at this moment; try again"
        ) from None
    for folder in folders:
        why = (
            ""
            if folder in new
            else ", the best"
            if directory.step_of(folder) == best
            else ", a process reads it"
        )
        print(f"removed {folder}" if folder in removed or not folder.exists() else f"kept    {folder}{why}")
    return 0


# what they need ---------------------------------------------------------------------------------------------


def new_file(to: str) -> Path:
    """Where to export to. Raises ValueError if that is no good."""
    from launch.checkpoint.export import FORMATS, exported

    path = Path(to)
    if path.suffix not in FORMATS:
        raise ValueError(
            f"to={to} must name a file to write that ends in {', '.join(FORMATS)}, such as to=weights.safetensors"
        )
    if not path.parent.is_dir():
        raise ValueError(f"to={to}: there is no folder {path.parent}")
    if there := exported(path):
        raise ValueError(
            f"to={to}: {there[0]} is there already, and is not overwritten; remove it or choose another name"
        )
    return path


def how_to_load(path: Path, model: str) -> str:
    """The line of Python that loads what was exported into `model`."""
    if path.suffix == ".json":
        return f'accelerate.load_checkpoint_in_model({model}, "{path}")'
    if path.suffix == ".safetensors":
        return f'safetensors.torch.load_model({model}, "{path}")'
    return f'{model}.load_state_dict(torch.load("{path}", weights_only=True))'


COMMANDS: dict[str, Callable[..., int]] = {
    "list": list_checkpoints,
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
    "export": export,
    "prune": prune,
}
