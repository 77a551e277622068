"""What manifests say of checkpoints: the lines of `ckpt list` and `ckpt inspect`. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.filesize import decimal

from launch.checkpoint.directory import list_checkpoints, list_quarantined
from launch.checkpoint.manifest import Manifest
from launch.cli.keys import flatten, format_value
from launch.runtime.wording import plural


class CheckpointSummary(NamedTuple):
    """A line of `ckpt list`."""

    name: str
    saved: str = ""
    size: str = ""
    writer: str = ""
    files: str = ""
    """complete or damaged, as far as their sizes show"""
    notes: str = ""


def summarize_checkpoints(run_dir: Path) -> Iterator[CheckpointSummary]:
    """The checkpoints of a run, oldest first, then those that were quarantined."""
    examined = {folder: examine(folder) for folder in list_checkpoints(run_dir)}
    best_step = best_step_of(manifest for manifest, _ in examined.values())
    for folder, (manifest, error) in examined.items():
        notes = [error] if error else []
        if manifest and manifest.step == best_step:
            notes.append("best")
        yield CheckpointSummary(
            folder.name,
            saved=saved_time(manifest) if manifest else "",
            size=decimal(manifest.size) if manifest else "",
            writer=writer_text(manifest) if manifest else "",
            files="damaged" if error else "complete",
            notes=", ".join(notes),
        )
    for folder in list_quarantined(run_dir):
        yield CheckpointSummary(folder.name, files="damaged", notes="quarantined by its run")


def best_step_of(manifests: Iterable[Manifest | None]) -> int | None:
    """The step of the best evaluation, as far as the newest of `manifests` (oldest first) knows."""
    steps = [manifest.progress.get("best_step") for manifest in manifests if manifest]
    return steps[-1] if steps else None


def examine(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint, and what is wrong with it, empty if nothing: as far as the sizes show."""
    try:
        manifest = Manifest.read(folder)
    except (ValueError, OSError) as error:
        if not folder.exists():
            return None, "removed just now: the run goes on"
        return None, str(error).replace(f"{folder}/", "")
    return manifest, manifest.size_error(folder)


def overview(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Names and values: the head of `ckpt inspect`."""
    progress = {name: value for name, value in manifest.progress.items() if name != "step"}
    others = {
        name: value for name, value in manifest.writer.items() if name not in ("strategy", "world_size")
    }
    yield (
        "step",
        f"{manifest.step:,} ({manifest.samples:,} samples, of a training set of {manifest.train_samples:,})",
    )
    yield "saved", saved_time(manifest)
    yield "by", writer_text(manifest) + (f" ({values_text(others)})" if others else "")
    yield "with", values_text(manifest.versions)
    yield "progress", values_text(dict(flatten(progress)))
    yield "size", size_text(manifest)
    error = manifest.size_error(folder)
    yield "files", f"damaged: {error}" if error else "complete, by their sizes (`verify` reads them)"
    for model, groups in manifest.optimizers.items():
        for index, group in enumerate(groups):
            count = plural(len(group["parameters"]), "parameter")
            settings = values_text(group["settings"])
            yield "optimizer", f"{model}, group {index}: {group['optimizer']} of {count}: {settings}"
    for model, aliases in manifest.tied.items():
        if aliases:
            yield "tied", f"{model}: {', '.join(f'{alias} is {name}' for alias, name in aliases.items())}"


def tensor_rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """The table of `ckpt inspect`: model and kind, tensors, elements, bytes, dtypes, fragments of each."""
    for (model, kind), names in groupby(sorted(manifest.tensors, key=model_and_kind), key=model_and_kind):
        entries = [manifest.tensors[name] for name in names]
        fragments = sorted({len(entry.files) for entry in entries})
        yield (
            f"{model} {kind}",
            f"{len(entries):,}",
            f"{sum(entry.numel for entry in entries):,}",
            decimal(sum(entry.nbytes for entry in entries)),
            " ".join(sorted({entry.dtype for entry in entries})),
            f"{fragments[0]} to {fragments[-1]}" if len(fragments) > 1 else str(fragments[0]),
        )


def model_and_kind(name: str) -> tuple[str, str]:
    """Of a tensor in a checkpoint: its model, and `weights`, `optimizer exp_avg` or the like."""
    model, _, rest = name.partition("/")
    kind, _, inner = rest.partition("/")
    if kind == "optimizer":
        return model, f"optimizer {inner.rpartition('/')[2]}"
    return model, "weights" if kind == "model" else kind


def saved_time(manifest: Manifest) -> str:
    """When it was saved, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time))


def writer_text(manifest: Manifest) -> str:
    """Which strategy wrote it on how many ranks: `fsdp x 8`."""
    world_size = manifest.writer.get("world_size", len(manifest.files))
    return f"{manifest.writer.get('strategy', '?')} x {world_size}"


def size_text(manifest: Manifest) -> str:
    """The size of all files, and of the smallest and the largest."""
    sizes = sorted(file.size for file in manifest.files)
    text = f"{decimal(manifest.size)} in {plural(len(sizes), 'file')}"
    return f"{text}, {decimal(sizes[0])} to {decimal(sizes[-1])} each" if len(sizes) > 1 else text


def values_text(values: dict[str, Any]) -> str:
    """Names and values, as one types them."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
