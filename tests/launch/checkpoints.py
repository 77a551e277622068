"""Checkpoints on disk as so many ranks would have written them, without any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.checkpoint.tensor_file import dtype_name, file_header
from launch.commands import ckpt
from launch.runtime.files import write_hashed
from strategies.sharded_state import slice_for_rank

CONFIG = {
    "recipe": "gpt",
    "strategy": "ddp",
    "seed": 0,
    "checkpoint": {"keep": 2, "best": False},
    "optim": {"lr": 0.1},
}
FIT_KEYS = ("batch_size=16", "micro_batch_size=4", "steps=6", "checkpoint.every=2", "checkpoint.keep=2")
"""of a run of `tests.launch.tiny:Fit` that leaves checkpoints of steps 4 and 6"""
WEIGHTS = {
    "layer.weight": torch.arange(30.0).view(5, 6),
    "layer.bias": torch.ones(5),
    "count": torch.tensor(7),
}
GROUPS: list[dict[str, Any]] = [
    {
        "optimizer": "AdamW",
        "parameters": ["weight", "bias"],
        "settings": {"weight_decay": 0.1, "betas": [0.9, 0.95]},
    }
]


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    ranks: int = 3,
    step: int = 10,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A checkpoint of `tensors` in `folder`, each cut evenly over `ranks`; `more` is for the manifest.
    Returns `folder`.
    """
    folder.mkdir(parents=True)
    manifest = Manifest(
        **{
            "step": step,
            "samples": 64 * step,
            "time": 1_760_000_000.0 + step,
            "progress": {"step": step, "best": None, "best_step": None, "bad_evaluations": 0},
            "config": dict(CONFIG if config is None else config),
            "train_samples": 1000,
            "optimizers": {},
            "tied": {},
            "versions": {"python": "3.12.1", "rankzero": "0.1.0", "torch": "2.14.1"},
            "writer": {"strategy": "ddp", "world_size": ranks, "device": "cpu"},
            **more,
        }
    )
    for name, tensor in tensors.items():
        manifest.tensors[name] = TensorEntry(
            dtype=dtype_name(tensor.dtype), shape=list(tensor.shape), cuts=[0], files=[], offsets=[]
        )
    for rank in range(ranks):
        held = {}
        for name, tensor in tensors.items():
            start, stop = slice_for_rank(tensor.numel(), rank, ranks)
            if stop > start:
                held[name] = tensor.contiguous().view(-1)[start:stop]
        header, placed, _ = file_header(
            {name: (dtype_name(part.dtype), tuple(part.shape)) for name, part in held.items()}
        )
        path = folder / f"rank-{rank:05d}.safetensors"
        content = (held[name].view(torch.uint8).numpy().data for name in placed)
        digest = write_hashed(path, [header, *content])
        manifest.files.append(FileEntry(name=path.name, size=path.stat().st_size, digest=digest))
        for name, stored in placed.items():
            entry = manifest.tensors[name]
            entry.cuts.append(entry.cuts[-1] + stored.numel)
            entry.files.append(rank)
            entry.offsets.append(len(header) + stored.offset)
    manifest.write(folder)
    return folder


def write_run(
    run_dir: Path, tensors: Mapping[str, Tensor], *, steps: tuple[int, ...] = (10, 20, 30), **more: Any
) -> Path:
    """A run with a checkpoint for each of `steps`. Returns `run_dir`."""
    for step in steps:
        write_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}", tensors, step=step, **more)
    return run_dir


def write_run_with_best(run_dir: Path) -> Path:
    """A run of `WEIGHTS` with three checkpoints, of which the first is the best. Returns `run_dir`."""
    return write_run(
        run_dir,
        state("model", WEIGHTS),
        config={**CONFIG, "checkpoint": {"keep": 2, "best": True}},
        progress={"step": 30, "best": 0.25, "best_step": 10, "bad_evaluations": 2},
        optimizers={"model": GROUPS},
        tied={"model": {"head.weight": "layer.weight"}},
    )


def damage(path: Path, position: int = -1) -> None:
    """Change the byte at `position` of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    """Remove the first byte of a file."""
    path.write_bytes(path.read_bytes()[1:])


def state(model: str, weights: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """`weights` as the state of a model under AdamW, whose own tensors are drawn."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{model}/model/{name}": tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            tensors[f"{model}/optimizer/{name}/step"] = torch.tensor(10.0)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{model}/optimizer/{name}/{key}"] = torch.rand(tensor.shape, generator=generator)
    return {**tensors, f"{model}/loss_scale": torch.tensor([65536.0, 3.0], dtype=torch.float64)}


def call(capsys: pytest.CaptureFixture[str], *argv: object, expect: int = 0) -> str:
    """The command in this process; what it printed, or for a mistake the one line on stderr."""
    try:
        code = ckpt.main([str(argument) for argument in argv])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    out, err = capsys.readouterr()
    assert code == expect, out + err
    if code == 2:
        assert not out
        assert len(err.splitlines()) == 1
        assert err.startswith("rankzero: ")
    return err if code == 2 else out + err
