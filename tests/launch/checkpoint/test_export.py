"""Weights out of a checkpoint, as the libraries that others use read them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import load_checkpoint_in_model
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from launch.checkpoint.export import HOW_TO_CONVERT, export_weights, files_with, weights_of
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
def test_a_torch_file_is_made_by_the_line_that_is_shown(tmp_path: Path, suffix: str) -> None:
    model, other = Net(3), Net(4)
    path = tmp_path / "w.safetensors"
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        export_weights(checkpoint, path)
    line = HOW_TO_CONVERT.format(path, path.with_suffix(f".{suffix}"))
    exec(f"import safetensors.torch, torch; {line}")
    state_dict = torch.load(path.with_suffix(f".{suffix}"), weights_only=True)
    assert other.load_state_dict(state_dict, strict=False).missing_keys == ["head.weight"]  # tied: once in it
    assert equal(model, other)


def test_shards_and_their_index(tmp_path: Path) -> None:
    model, other = Net(3), Net(4)
    path = tmp_path / "w.safetensors"
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        *shards, index = export_weights(checkpoint, path, shard_bytes=200)
    assert [file.name for file in shards] == [
        f"w-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    assert index.name == "w.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in unique(model, TIED["net"]).values())
    for file in shards:
        names = {name for name, place in content["weight_map"].items() if place == file.name}
        assert names == set(load_file(file))
    assert set(content["weight_map"]) == set(unique(model, TIED["net"]))
    load_checkpoint_in_model(other, str(index))
    assert equal(model, other)


def test_several_models(tmp_path: Path) -> None:
    student, teacher = Net(3), Net(4)
    with Checkpoint(written(tmp_path / "step", student=student, teacher=teacher)) as checkpoint:
        export_weights(checkpoint, tmp_path / "all.safetensors")
        export_weights(checkpoint, tmp_path / "teacher.safetensors", models=["teacher"])
        with pytest.raises(ValueError, match=r"model=judge is not in .*, which holds student, teacher"):
            export_weights(checkpoint, tmp_path / "judge.safetensors", models=["judge"])
    loaded = nn.ModuleDict({"student": Net(5), "teacher": Net(6)})
    load_model(loaded, tmp_path / "all.safetensors")
    assert equal(loaded, nn.ModuleDict({"student": student, "teacher": teacher}))
    alone = Net(5)
    load_model(alone, tmp_path / "teacher.safetensors")
    assert equal(alone, teacher)


def test_conversion(tmp_path: Path) -> None:
    model = Net(3)
    with Checkpoint(written(tmp_path / "step", net=model)) as checkpoint:
        export_weights(checkpoint, tmp_path / "w.safetensors", dtype="bf16")
        export_weights(checkpoint, tmp_path / "full.safetensors", dtype="fp32")
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        whole = model.state_dict()[name]
        assert torch.equal(tensor, whole.bfloat16() if whole.is_floating_point() else whole)
    assert load_file(tmp_path / "full.safetensors")["scale"].dtype == torch.float32


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
        with pytest.raises(ValueError, match="rank-00002"):
            export_weights(checkpoint, tmp_path / "w.safetensors", shard_bytes=200)
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
if len(sys.argv) > 3:
    import torch  # half a gigabyte by itself, and needed for a conversion only
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
    for words in (("w.safetensors",), ("half.safetensors", "bf16")):
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
    loaded = load_file(large_folder / "w.safetensors")
    assert all(torch.equal(loaded[name.rpartition("/")[2]], tensor) for name, tensor in tensors.items())
    half = load_file(large_folder / "half.safetensors")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in loaded.items())
