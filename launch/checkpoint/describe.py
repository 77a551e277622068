"""What can be said of checkpoints by their manifests alone. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.filesize import decimal

from launch.checkpoint.directory import DAMAGED, checkpoints_dir, list_checkpoints
from launch.checkpoint.manifest import Manifest, TensorEntry
from launch.checkpoint.tensor_file import SIZES
from launch.cli.config import flatten, show
from launch.runtime.text import plural


class Row(NamedTuple):
    """A line of `list`."""

    name: str
    saved: str = ""
    size: str = ""
    writer: str = ""
    files: str = ""
    """as far as their sizes tell"""
    notes: str = ""


def rows(run_dir: Path) -> Iterator[Row]:
    """The checkpoints of a run, oldest first, then those that were set aside."""
    found = {folder: examine(folder) for folder in list_checkpoints(run_dir)}
    best = best_of(manifest for manifest, _ in found.values())
    for folder, (manifest, problem) in found.items():
        notes = [problem] if problem else []
        if manifest and manifest.step == best:
            notes.append("best")
        on_progress = (when(manifest), decimal(manifest.size), writer(manifest)) if manifest else ("", "", "")
        yield Row(folder.name, *on_progress, "damaged" if problem else "complete", ", ".join(notes))
    for folder in sorted(checkpoints_dir(run_dir).glob(f"step-*{DAMAGED}")):
        yield Row(folder.name, files="damaged", notes="set aside by its run")


def best_of(manifests: Iterable[Manifest | None]) -> int | None:
    """The step of the best evaluation, as far as the newest of `manifests` (oldest first) knows."""
    known = [manifest.progress.get("best_step") for manifest in manifests if manifest]
    return known[-1] if known else None


def examine(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint, and what is wrong with the checkpoint, in words, as far as that can be
    told in no time.
    """
    try:
        manifest = Manifest.read(folder)
    except (ValueError, OSError) as error:
        return None, str(error).replace(
            f"{folder}/", ""
        ) if folder.exists() else "removed just now: the run goes on"
    return manifest, manifest.problem(folder)


def facts(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Names and values: the head of `inspect`."""
    problem = manifest.problem(folder)
    sizes = sorted(file.size for file in manifest.files)
    progress = {name: value for name, value in manifest.progress.items() if name != "step"}
    others = {
        name: value for name, value in manifest.writer.items() if name not in ("strategy", "world_size")
    }
    yield (
        "step",
        f"{manifest.step:,} ({manifest.samples:,} samples, of a training set of {manifest.train_samples:,})",
    )
    yield "saved", when(manifest)
    yield "by", writer(manifest) + (f" ({words(others)})" if others else "")
    yield "with", words(manifest.versions)
    yield "progress", words(dict(flatten(progress)))
    yield (
        "size",
        f"{decimal(manifest.size)} in {plural(len(sizes), 'file')}"
        + (f", {decimal(sizes[0])} to {decimal(sizes[-1])} each" if len(sizes) > 1 else ""),
    )
    yield "files", f"damaged: {problem}" if problem else "complete, by their sizes (`verify` reads them)"
    for model, groups in manifest.optimizers.items():
        for n, group in enumerate(groups):
            of = plural(len(group["parameters"]), "parameter")
            yield "optimizer", f"{model}, group {n}: {group['optimizer']} of {of}: {words(group['settings'])}"
    for model, aliases in manifest.tied.items():
        if aliases:
            yield "tied", f"{model}: {', '.join(f'{alias} is {name}' for alias, name in aliases.items())}"


def parts(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Rows of what is in it: model and kind, tensors, elements, bytes, types, in how many pieces each."""

    def kind(name: str) -> tuple[str, str]:
        model, _, rest = name.partition("/")
        what, _, inner = rest.partition("/")
        return (
            model,
            f"optimizer {inner.rpartition('/')[2]}"
            if what == "optimizer"
            else "weights"
            if what == "model"
            else what,
        )

    for (model, what), names in groupby(sorted(manifest.tensors, key=kind), key=kind):
        entries = [manifest.tensors[name] for name in names]
        pieces = sorted({len(entry.files) for entry in entries})
        yield (
            f"{model} {what}",
            f"{len(entries):,}",
            f"{sum(entry.numel for entry in entries):,}",
            decimal(sum(size(entry) for entry in entries)),
            " ".join(sorted({entry.dtype for entry in entries})),
            f"{pieces[0]} to {pieces[-1]}" if len(pieces) > 1 else str(pieces[0]),
        )


def size(entry: TensorEntry) -> int:
    """Bytes of a tensor."""
    return entry.numel * SIZES[entry.dtype]


def when(manifest: Manifest) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time))


def writer(manifest: Manifest) -> str:
    """Who wrote it."""
    return (
        f"{manifest.writer.get('strategy', '?')} x {manifest.writer.get('world_size', len(manifest.files))}"
    )


def words(values: dict[str, Any]) -> str:
    """A mapping as one would type it."""
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())
