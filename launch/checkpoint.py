"""Resumable checkpoints: every rank writes its ranges, one rename commits them. No gather, no pickle.

A checkpoint is a folder `step-NNNNNNNN`:
    rank-NNNNN.safetensors   the ranges that one rank wrote, 1-D, named as in the manifest
    manifest.json            progress, versions, shapes, and for each tensor its ranges: [start, length, file]
Names are MODEL/model/PARAMETER, MODEL/optimizer/PARAMETER/KEY and MODEL/loss_scale. World size and strategy of the writer do
not matter to the reader, which asks for ranges. (A 2-D shard would be written as one range for each of its rows.)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.files import sync, write_text_whole, write_whole
from launch.job import Job
from launch.world import barrier

FOLDER = re.compile(r"step-\d{8}")


def save(job: Job, run_dir: Path, versions: Mapping[str, str]) -> Path:
    """Write a checkpoint of `job` and remove the oldest beyond `checkpoint.keep`. All ranks call it; returns its folder."""
    from safetensors.torch import save_file

    job.statistics.synchronise(job.world)
    folder = run_dir / "checkpoints" / f"step-{job.progress.step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    if job.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    file = f"rank-{job.world.rank:05d}.safetensors"
    ranges = {f"{name}/{entry}": part for name, held in job.strategies.items() for entry, part in held.state().items()}
    save_file({name: part.values.detach().cpu().contiguous() for name, part in ranges.items()}, partial / file)
    sync(partial / file)
    # each rank leaves its part of the manifest beside its file: nothing is gathered through one process
    table = {name: {"shape": part.shape, "range": [part.start, len(part.values), file]} for name, part in ranges.items()}
    (partial / f"{file}.json").write_text(json.dumps(table))
    barrier()
    if job.world.rank == 0:
        write_manifest(partial, {"progress": job.progress.state(), "versions": dict(versions), **origin(job)})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)
        prune(folder.parent, job)
    return folder


def origin(job: Job) -> dict[str, Any]:
    """What a resuming run must agree with, and who wrote."""
    config = job.config
    return {
        "recipe": config.recipe,
        "must_agree": {"seed": config.seed, "batch_size": config.batch_size, "train_samples": len(job.splits.train)},
        "writer": {"strategy": config.strategy, "world_size": job.world.world_size},
    }


def write_manifest(folder: Path, head: dict[str, Any]) -> None:
    """Join the tables that the ranks left into `manifest.json`."""
    tensors: dict[str, Any] = {}
    for part in sorted(folder.glob("rank-*.safetensors.json")):
        for name, entry in json.loads(part.read_text()).items():
            tensor = tensors.setdefault(name, {"shape": entry["shape"], "ranges": []})
            tensor["ranges"].append(entry["range"])
        part.unlink()
    write_text_whole(folder / "manifest.json", json.dumps({**head, "tensors": tensors}))


def prune(folder: Path, job: Job) -> None:
    """Remove all but the newest `checkpoint.keep` checkpoints and, under `checkpoint.best`, the best."""
    found = complete(folder)
    best = f"step-{job.progress.best_step or 0:08d}" if job.config.checkpoint.best else None
    for old in found[: -job.config.checkpoint.keep]:
        if old.name != best:
            shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """The committed checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and (path / "manifest.json").is_file())


class Checkpoint:
    """A committed checkpoint, read by ranges (a `strategies.state.Reader` of one model after `of`)."""

    def __init__(self, folder: Path, model: str = "") -> None:
        """Raises ValueError if `folder` is no checkpoint."""
        if not (folder / "manifest.json").is_file():
            raise ValueError(f"{folder} is not a checkpoint: it has no manifest.json")
        self.folder, self.model = folder, model
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())

    def of(self, model: str) -> Checkpoint:
        """The part of one model."""
        return Checkpoint(self.folder, f"{model}/")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors of this model, by name."""
        return {
            name.removeprefix(self.model): tuple(entry["shape"])
            for name, entry in self.manifest["tensors"].items()
            if name.startswith(self.model)
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of a flattened tensor, from whichever files hold them. Raises ValueError if some are missing."""
        from safetensors import safe_open

        full = self.model + name
        if full not in self.manifest["tensors"]:
            raise ValueError(f"{self.folder} holds no {full}: it was saved by another recipe or model")
        parts: dict[int, Tensor] = {}
        for first, length, file in self.manifest["tensors"][full]["ranges"]:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                with safe_open(self.folder / file, framework="pt") as opened:
                    parts[low] = opened.get_slice(full)[low - first : high - first]
        pieces = [parts[first] for first in sorted(parts)]
        if sum(len(piece) for piece in pieces) != stop - start:
            raise ValueError(f"{self.folder}: values {start} to {stop} of {full} are not all there")
        return torch.cat(pieces) if pieces else torch.empty(0)


def load(job: Job, folder: Path) -> None:
    """Continue `job` from a checkpoint. Raises ValueError if it is of another recipe, data set, seed or batch size."""
    checkpoint = Checkpoint(folder)
    mine, manifest = origin(job), checkpoint.manifest
    if manifest["recipe"] != mine["recipe"]:
        raise ValueError(f"{folder} belongs to recipe={manifest['recipe']}, not {mine['recipe']}; choose another run_dir")
    for name, value in mine["must_agree"].items():
        if manifest["must_agree"][name] != value:
            raise ValueError(
                f"{folder} was saved with {name}={manifest['must_agree'][name]}, this run has {value}: the curve would not "
                "continue; use the same, another run_dir, or resume=none"
            )
    for name, strategy in job.strategies.items():
        strategy.load_state(checkpoint.of(name))
    job.progress.load_state(manifest["progress"])


def export(job: Job, path: Path) -> None:
    """`model.safetensors`: all weights, plain names, written by rank zero. Several models: MODEL.PARAMETER. All ranks call."""
    from safetensors.torch import save_file

    job.statistics.synchronise(job.world)
    many = len(job.strategies) > 1
    tensors = {
        f"{name}.{key}" if many else key: tensor
        for name, strategy in job.strategies.items()
        for key, tensor in strategy.export().items()
    }
    if job.world.rank == 0:
        write_whole(path, lambda beside: save_file(tensors, beside))
