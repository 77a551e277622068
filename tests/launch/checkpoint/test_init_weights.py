"""`init=`: weights from files of all kinds into a fresh run, under every strategy."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from launch.checkpoint.init_weights import load_initial_weights
from launch.equivalence.whole_model import whole_model
from launch.state.run import Run
from recipes.parts.data import Splits
from tests.launch.runs import make_run, single_rank, train_run
from tests.launch.tiny import FEATURES, Fit, Points
from tests.ranks import CpuWorld, RanksFailed, run_ranks

WORDS = ("steps=8", "batch_size=8", "micro_batch_size=4", "optimizer=sgd", "dropout=0", "noise=0")
Tensors = dict[str, Tensor]


def tiny(recipe: str, *words: str, place: CpuWorld | None = None) -> Run:
    """A run of one of the recipes below."""
    return make_run(
        place or single_rank(),
        "",
        f"recipe=tests.launch.checkpoint.test_init_weights:{recipe}",
        *WORDS,
        *words,
    )


class Wide(nn.Module):
    """Big enough that it shows who reads what; BatchNorm brings buffers, the head is tied, no size divides by
    two.
    """

    def __init__(self, ties: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 33)
        self.norm = nn.BatchNorm1d(33)
        self.module = nn.Linear(33, 33)
        self.head = nn.Linear(33, 33, bias=False)
        self.out = nn.Linear(33, 1)
        if ties:
            self.head.weight = self.module.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.head(self.module(self.norm(self.stem(x)).tanh())))
        return result


@dataclass(kw_only=True)
class Tied(Fit):
    def build_data(self) -> Splits:
        return Splits(train=Points(self.size))

    def build_model(self) -> nn.Module:
        return Wide()


@dataclass(kw_only=True)
class Untied(Tied):
    def build_model(self) -> nn.Module:
        return Wide(ties=False)


@dataclass(kw_only=True)
class Two(Tied):
    """A trained student and a fixed teacher."""

    def models(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {"student": self.build_model, "teacher": lambda: nn.Linear(FEATURES, 1)}

    def optimizers(self) -> Mapping[str, Callable[[nn.Module], Optimizer]]:
        return {"student": self.build_optimizer}

    def losses(self) -> Mapping[str, Any]:
        def student(models: dict[str, nn.Module], batch: Any) -> Tensor:
            loss: Tensor = self.loss(models["student"], batch) + models["teacher"](batch[0]).square().sum()
            return loss

        return {"student": student}


@dataclass(kw_only=True)
class Twins(Two):
    def models(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {"student": self.build_model, "teacher": self.build_model}


def elsewhere(seed: int = 1, ties: bool = True) -> Wide:
    """A model as somebody else has trained it, on a known seed."""
    torch.manual_seed(seed)
    model = Wide(ties)
    model(torch.randn(20, FEATURES))
    return model


def unique(model: nn.Module) -> Tensors:
    """Its tensors, those that are tied once, for safetensors."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def weights_of(run: Run) -> Tensors:
    many = len(run.strategies) > 1
    return {
        f"{model}.{name}" if many else name: tensor
        for model, strategy in run.strategies.items()
        for name, tensor in whole_model(strategy, run.world).items()
    }


def same(found: Tensors, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.to(dtype).to(tensor.dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(found[name], tensor), name


# where they come from ---------------------------------------------------------------------------------------


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def sharded(folder: Path) -> Path:
    """As Hugging Face writes a big model."""
    held = unique(elsewhere())
    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(held.items())[i::2]) for i in range(2)}
    for file, part in halves.items():
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def saved(path: Path, content: Any, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path, **how)
    return path


SOURCES: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: saved(folder / "a.safetensors", unique(elsewhere())),
    "torch": lambda folder: saved(folder / "a.pt", elsewhere().state_dict()),
    "old torch": lambda folder: saved(
        folder / "a.pth", elsewhere().state_dict(), _use_new_zipfile_serialization=False
    ),
    "nested": lambda folder: saved(
        folder / "a.ckpt",
        {
            "best": torch.tensor(0.5),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
            "ema": elsewhere(7).state_dict(),
            "state_dict": elsewhere().state_dict(),
        },
    ),
    "a name of its own": lambda folder: saved(folder / "a.pt", {"net": elsewhere().state_dict(), "epoch": 3}),
    "parameters": lambda folder: saved(
        folder / "a.pt", dict(elsewhere().named_parameters()) | dict(elsewhere().named_buffers())
    ),
    "ddp": lambda folder: saved(folder / "a.pt", prefixed("module.", elsewhere().state_dict())),
    "compiled": lambda folder: saved(
        folder / "a.pt", prefixed("_orig_mod.module.", elsewhere().state_dict())
    ),
    "in a larger model": lambda folder: saved(
        folder / "a.pt", prefixed("net.body.", elsewhere().state_dict())
    ),
    "sharded": sharded,
    "folder of shards": lambda folder: sharded(folder).parent,
    "folder": lambda folder: saved(folder / "only.safetensors", unique(elsewhere())).parent,
    "finished run": lambda folder: saved(folder / "run" / "model.safetensors", unique(elsewhere())).parent,
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_weights_may_lie_in(tmp_path: Path, source: str) -> None:
    run = tiny("Tied")
    words = load_initial_weights(run, str(SOURCES[source](tmp_path)))
    same(weights_of(run), unique(elsewhere()))
    assert "(11 of 11 tensors" in words
    assert ("without 'net.body.'" in words) == (source == "in a larger model")
    assert ("[state_dict]" in words) == (source == "nested")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_is_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    run = tiny("Tied")
    held = {name: t.to(dtype) if t.is_floating_point() else t for name, t in unique(elsewhere()).items()}
    load_initial_weights(run, str(saved(tmp_path / "a.safetensors", held)))
    same(weights_of(run), unique(elsewhere()), dtype)


@pytest.mark.parametrize("name", ["module.weight", "head.weight"])
def test_a_tied_tensor_may_have_either_name(tmp_path: Path, name: str) -> None:
    held = unique(elsewhere())
    held[name] = held.pop("module.weight")
    run = tiny("Tied")
    assert "(11 of 11 tensors)" in load_initial_weights(run, str(saved(tmp_path / "a.safetensors", held)))
    same(weights_of(run), unique(elsewhere()))


def run_of(world: CpuWorld, recipe: str, strategy: str, folder: Path) -> Tensors:
    return weights_of(train_run(tiny(recipe, f"strategy={strategy}", place=world), folder))


def init_of(world: CpuWorld, recipe: str, strategy: str, path: Path, *words: str) -> tuple[str, Tensors]:
    run = tiny(recipe, f"strategy={strategy}", *words, place=world)
    said = load_initial_weights(run, str(path))
    return said, weights_of(run)


def test_a_run_or_its_checkpoint(tmp_path: Path) -> None:
    expected = run_ranks(2, run_of, "Two", "fsdp", tmp_path)[0]
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    for path in (tmp_path, checkpoints[-1]):
        said, found = run_ranks(2, init_of, "Two", "ddp", path)[0]
        assert str(checkpoints[-1]) in said
        same(found, expected)
    # one model of two; and a model that ties no longer what was tied
    said, found = init_of(single_rank(), "Untied", "single", tmp_path, "init_partial=true")
    assert (
        "12 of 12 tensors, its names without 'student.'; not used by the model: 2 (teacher.bias, teacher.weight)"
        in said
    )
    assert all(torch.equal(found[name], expected[f"student.{name}"]) for name in unique(elsewhere()))
    assert torch.equal(found["head.weight"], expected["student.module.weight"])
    file = next(checkpoints[-1].glob("rank-00001*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, init_of, "Two", "ddp", tmp_path)
    assert all(f"{file} is damaged" in text for text in failed.value.errors.values())
    assert len(failed.value.errors) == 2


def test_one_model_of_several(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", unique(elsewhere()))
    before = weights_of(tiny("Two"))
    with pytest.raises(
        ValueError,
        match=r"its names put under 'student.'; not in the file: 2 \(teacher.weight, teacher.bias\)",
    ):
        init_of(single_rank(), "Two", "single", path)
    _, found = init_of(single_rank(), "Two", "single", path, "init_partial=true")
    same(found, before | prefixed("student.", unique(elsewhere())))
    with pytest.raises(ValueError, match=r"fits in two ways, .*'student.' and .*'teacher.'"):
        init_of(single_rank(), "Twins", "single", path, "init_partial=true")
    torch.manual_seed(3)
    both = {"student": elsewhere().state_dict(), "teacher": nn.Linear(FEATURES, 1).state_dict()}
    said, found = init_of(single_rank(), "Two", "single", saved(tmp_path / "both.pt", both))
    assert "both.pt[student, teacher] (13 of 13 tensors)" in said
    same(found, prefixed("student.", unique(elsewhere())) | prefixed("teacher.", both["teacher"]))


# what does not fit ------------------------------------------------------------------------------------------


def other_head(model: Wide) -> Tensors:
    """As after another task: another head, one more layer, one less."""
    held = unique(model) | {"out.weight": torch.zeros(7, 33), "extra.weight": torch.ones(2)}
    return {
        name: tensor for name, tensor in held.items() if name not in ("stem.bias", "norm.num_batches_tracked")
    }


def test_differences_are_listed_and_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", other_head(elsewhere()))
    with pytest.raises(ValueError, match="fits") as refused:
        load_initial_weights(tiny("Tied"), str(path))
    assert str(refused.value).endswith(
        "a.safetensors: it fits 8 of 10 tensors; not in the file: 1 (stem.bias); not used by the model: 1 "
        "(extra.weight); of another shape: 1 (out.weight 1 x 33, in the file 7 x 33). If that is meant, say init_partial=true"
    )
    run = tiny("Tied", "init_partial=true")
    before = weights_of(run)
    assert "8 of 10 tensors; not in the file: 1 (stem.bias)" in load_initial_weights(run, str(path))
    kept = ("stem.bias", "out.weight", "norm.num_batches_tracked")
    same(
        weights_of(run),
        {name: before[name] if name in kept else t for name, t in unique(elsewhere()).items()},
    )


def test_the_counter_of_batchnorm_may_be_missing(tmp_path: Path) -> None:
    held = {
        name: tensor
        for name, tensor in elsewhere().state_dict().items()
        if name != "norm.num_batches_tracked"
    }
    assert "(10 of 10 tensors)" in load_initial_weights(tiny("Tied"), str(saved(tmp_path / "a.pt", held)))


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
        lambda folder: saved(folder / "a.pt", elsewhere()),
        "it holds tests.launch.checkpoint.test_init_weights.Wide, not weights",
    ),
    "other objects": (
        lambda folder: saved(folder / "a.pt", {"model": elsewhere().state_dict(), "args": Namespace(lr=1)}),
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
