"""`init=`: what weights may be in, and what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.checkpoint.init_weights import load_initial_weights
from tests.launch.checkpoint.pretrained import (
    assert_same,
    prefixed,
    pretrained,
    saved,
    sharded,
    tiny,
    unique,
    weights_of,
)

SOURCES: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: saved(folder / "a.safetensors", unique(pretrained())),
    "torch": lambda folder: saved(folder / "a.pt", pretrained().state_dict()),
    "old torch": lambda folder: saved(
        folder / "a.pth", pretrained().state_dict(), _use_new_zipfile_serialization=False
    ),
    "nested": lambda folder: saved(
        folder / "a.ckpt",
        {
            "best": torch.tensor(0.5),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
            "ema": pretrained(7).state_dict(),
            "state_dict": pretrained().state_dict(),
        },
    ),
    "a name of its own": lambda folder: saved(
        folder / "a.pt", {"net": pretrained().state_dict(), "epoch": 3}
    ),
    "parameters": lambda folder: saved(
        folder / "a.pt", dict(pretrained().named_parameters()) | dict(pretrained().named_buffers())
    ),
    "ddp": lambda folder: saved(folder / "a.pt", prefixed("module.", pretrained().state_dict())),
    "compiled": lambda folder: saved(
        folder / "a.pt", prefixed("_orig_mod.module.", pretrained().state_dict())
    ),
    "in a larger model": lambda folder: saved(
        folder / "a.pt", prefixed("net.body.", pretrained().state_dict())
    ),
    "sharded": sharded,
    "folder of shards": lambda folder: sharded(folder).parent,
    "folder": lambda folder: saved(folder / "only.safetensors", unique(pretrained())).parent,
    "finished run": lambda folder: saved(folder / "run" / "model.safetensors", unique(pretrained())).parent,
}


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_file_is_read(tmp_path: Path, source: str) -> None:
    run = tiny("Tied")
    message = load_initial_weights(run, str(SOURCES[source](tmp_path)))
    assert_same(weights_of(run), unique(pretrained()))
    assert "(11 of 11 tensors" in message
    assert ("without 'net.body.'" in message) == (source == "in a larger model")
    assert ("[state_dict]" in message) == (source == "nested")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_is_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    run = tiny("Tied")
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in unique(pretrained()).items()}
    load_initial_weights(run, str(saved(tmp_path / "a.safetensors", tensors)))
    assert_same(weights_of(run), unique(pretrained()), dtype)


@pytest.mark.parametrize("name", ["module.weight", "head.weight"])
def test_a_tied_tensor_may_have_either_name(tmp_path: Path, name: str) -> None:
    tensors = unique(pretrained())
    tensors[name] = tensors.pop("module.weight")
    run = tiny("Tied")
    assert "(11 of 11 tensors)" in load_initial_weights(run, str(saved(tmp_path / "a.safetensors", tensors)))
    assert_same(weights_of(run), unique(pretrained()))


def outward(folder: Path) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"out.bias": "../a.safetensors"}}))
    return index


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda folder: folder / "a.pt", "there is no such file"),
    "an empty folder": (lambda folder: folder, "a folder without checkpoint"),
    "a whole model": (
        lambda folder: saved(folder / "a.pt", pretrained()),
        "it holds tests.launch.checkpoint.pretrained.Wide, not weights",
    ),
    "other objects": (
        lambda folder: saved(folder / "a.pt", {"model": pretrained().state_dict(), "args": Namespace(lr=1)}),
        "it holds argparse.Namespace, not weights alone",
    ),
    "another file": (
        lambda folder: written(folder / "a.pt", b"hello world"),
        "neither a safetensors nor a complete torch file",
    ),
    "an empty file": (lambda folder: written(folder / "a.safetensors", b""), "is no safetensors file"),
    "a list": (lambda folder: saved(folder / "a.pt", [torch.ones(2)]), "no state_dict in it"),
    "two": (
        lambda folder: saved(folder / "a.pt", {"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}),
        r"\(g, d\)",
    ),
    "another model": (
        lambda folder: saved(folder / "a.pt", {"x": torch.ones(2)}),
        "nothing in it fits the model; not in the file",
    ),
    "an index that leads out": (outward, "leads out of its folder"),
    "an index of nothing": (
        lambda folder: written(folder / "a.safetensors.index.json", b"[]"),
        "it has no weight_map",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        load_initial_weights(tiny("Tied", "init_partial=true"), str(path))
    assert str(refused.value).startswith(f"init={path}")
    assert len(str(refused.value).splitlines()) == 1
