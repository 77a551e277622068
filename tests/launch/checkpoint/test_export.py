"""Weights out of a checkpoint, as the libraries that others use read them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import load_checkpoint_in_model
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from launch.checkpoint.export import export_weights, files_with, weights_of
from launch.checkpoint.reader import Checkpoint
from tests.launch.checkpoints import state, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]


class Net(nn.Module):
    """Tied weights, BatchNorm's counter, and buffers of other types, one of them empty."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(7).bfloat16())
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("nothing", torch.empty(0, 3))
        self.norm.num_batches_tracked = torch.tensor(seed)


TIED = {"net": {"head.weight": "embed.weight"}}


def unique(model: nn.Module, tied: dict[str, str]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def written(folder: Path, ranks: int = 3, **models: nn.Module) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, model in models.items():
        tensors |= state(name, unique(model, TIED["net"]))
    return write_checkpoint(folder, tensors, ranks=ranks, tied={name: TIED["net"] for name in models})


def equal(first: nn.Module, second: nn.Module) -> bool:
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_safetensors(tmp_path: Path, ranks: int) -> None:
    model, other = Net(3), Net(4)
    with Checkpoint(written(tmp_path / "step", ranks, net=model)) as checkpoint:
        assert export_weights(checkpoint, tmp_path / "w.safetensors") == [tmp_path / "w.safetensors"]
    assert not equal(model, other)
    load_model(other, tmp_path / "w.safetensors")  # strict
    assert equal(model, other)
    loaded = load_file(tmp_path / "w.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {
        name: (t.dtype, t.shape) for name, t in unique(model, TIED["net"]).items()
    }
    with safe_open(tmp_path / "w.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "head.weight": "embed.weight"}


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch(tmp_path: Path, suffix: str, mmap: bool) -> None:
    model, other = Net(3), Net(4)
    path = tmp_path / f"w.{suffix}"
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        export_weights(checkpoint, path)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert type(loaded) is dict
    assert set(loaded) == set(model.state_dict())
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    other.load_state_dict(loaded)  # strict
    assert equal(model, other)
    if mmap:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # the checksums are those of the values
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step", path.name]


def test_a_torch_file_is_what_torch_writes(tmp_path: Path) -> None:
    model = Net(3)
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        export_weights(checkpoint, tmp_path / "w.pt")
    (tmp_path / "theirs").mkdir()
    names = [*weights_of(Checkpoint(tmp_path / "step").manifest), "head.weight"]
    torch.save({name: model.state_dict()[name].clone() for name in names}, tmp_path / "theirs" / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as ours, zipfile.ZipFile(tmp_path / "theirs" / "w.pt") as theirs:
        mine = [name for name in ours.namelist() if "/data/" in name]
        assert len(mine) == len([name for name in theirs.namelist() if "/data/" in name]) - 1  # the tied one
        assert all(ours.read(name) == theirs.read(name) for name in mine)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_shards_and_their_index(tmp_path: Path, suffix: str) -> None:
    model, other = Net(3), Net(4)
    path = tmp_path / f"w.{suffix}"
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        *shards, index = export_weights(checkpoint, path, shard_bytes=200)
    assert [file.name for file in shards] == [
        f"w-{n:05d}-of-{len(shards):05d}.{suffix}" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    assert index.name == f"w.{suffix}.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in unique(model, TIED["net"]).values())
    for file in shards:
        loaded = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
        assert {name for name, place in content["weight_map"].items() if place == file.name} == set(loaded)
    aliases = {"head.weight"} if suffix == "pt" else set()
    assert set(content["weight_map"]) == {*unique(model, TIED["net"]), *aliases}
    load_checkpoint_in_model(other, str(index))
    assert equal(model, other)


def test_several_models(tmp_path: Path) -> None:
    student, teacher = Net(3), Net(4)
    with Checkpoint(written(tmp_path / "step", student=student, teacher=teacher)) as checkpoint:
        export_weights(checkpoint, tmp_path / "all.safetensors")
        export_weights(checkpoint, tmp_path / "all.pt")
        export_weights(checkpoint, tmp_path / "teacher.pt", models=["teacher"])
        with pytest.raises(ValueError, match=r"model=judge is not in .*, which holds student, teacher"):
            export_weights(checkpoint, tmp_path / "judge.pt", models=["judge"])
    loaded = nn.ModuleDict({"student": Net(5), "teacher": Net(6)})
    load_model(loaded, tmp_path / "all.safetensors")
    assert equal(loaded, nn.ModuleDict({"student": student, "teacher": teacher}))
    loaded = nn.ModuleDict({"student": Net(5), "teacher": Net(6)})
    loaded.load_state_dict(torch.load(tmp_path / "all.pt", weights_only=True))
    assert equal(loaded, nn.ModuleDict({"student": student, "teacher": teacher}))
    alone = Net(5)
    alone.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert equal(alone, teacher)


def test_conversion(tmp_path: Path) -> None:
    model = Net(3)
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        export_weights(checkpoint, tmp_path / "w.safetensors", dtype="bf16")
        export_weights(checkpoint, tmp_path / "w.pt", dtype="fp32")
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        whole = model.state_dict()[name]
        assert torch.equal(tensor, whole.bfloat16() if whole.is_floating_point() else whole)
    assert torch.load(tmp_path / "w.pt", weights_only=True)["scale"].dtype == torch.float32


def test_another_export_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (tmp_path / "w-00001-of-mine.safetensors").touch()
    with Checkpoint(written(tmp_path / "step", net=Net())) as checkpoint:
        shards = export_weights(checkpoint, path, shard_bytes=200)
        assert export_weights(checkpoint, path) == [path]
        assert not any(file.exists() for file in shards)
        assert export_weights(checkpoint, path, shard_bytes=200) == shards
    assert not path.exists()
    assert {file.name for file in tmp_path.iterdir()} == {
        "step",
        "w-00001-of-mine.safetensors",
        *(f.name for f in shards),
    }


def test_all_or_none(tmp_path: Path) -> None:
    with Checkpoint(written(tmp_path / "step", net=Net())) as checkpoint:
        (tmp_path / "step" / "rank-00002.safetensors").write_bytes(b"")
        for name in ("w.safetensors", "w.pt"):
            with pytest.raises(ValueError, match="rank-00002"):
                export_weights(checkpoint, tmp_path / name, shard_bytes=200)
    assert [file.name for file in tmp_path.iterdir()] == ["step"]


def test_only_what_is_needed_must_be_whole(tmp_path: Path) -> None:
    """With a weight of one element, only the last rank holds any of it."""
    tensors = {"net/model/w": torch.ones(1), "net/optimizer/w/exp_avg": torch.ones(9)}
    with Checkpoint(write_checkpoint(tmp_path / "step", tensors)) as checkpoint:
        assert files_with(checkpoint.manifest, weights_of(checkpoint.manifest).values()) == [2]


MEASURE = """
import re, sys
from pathlib import Path
from launch.checkpoint.export import export_weights
from launch.checkpoint.reader import Checkpoint
def peak():  # not ru_maxrss: that begins with what the parent had
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
if not sys.argv[2].endswith(".safetensors"):
    import torch  # half a gigabyte by itself; safetensors files are written without
before = peak()
with Checkpoint(Path(sys.argv[1])) as checkpoint:
    export_weights(checkpoint, Path(sys.argv[2]), dtype=sys.argv[3] if len(sys.argv) > 3 else None)
print(peak() - before)
"""


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """pytest keeps the folders of its last runs; gigabytes are not worth it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_memory_is_bounded(large_folder: Path) -> None:
    """A tensor of 400 MB, two of 100: no more than a few chunks of 32 MiB at a time."""
    tensors = {
        f"net/model/{n}": torch.rand(numel) for n, numel in enumerate((25_000_000, 100_000_000, 25_000_000))
    }
    write_checkpoint(large_folder / "step", tensors)
    for words in (("w.safetensors",), ("w.pt",), ("half.pt", "bf16")):
        asked = [sys.executable, "-c", MEASURE, "step", *words]
        done = subprocess.run(
            asked,
            cwd=large_folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        print(f"{words[0]}: {int(done.stdout) / 1e6:.0f} MB beyond the imports")
        assert 1e6 < int(done.stdout) < 150e6
    for loaded in (
        load_file(large_folder / "w.safetensors"),
        torch.load(large_folder / "w.pt", mmap=True, weights_only=True),
    ):
        assert all(torch.equal(loaded[name.rpartition("/")[2]], tensor) for name, tensor in tensors.items())
