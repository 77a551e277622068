"""Recipes and files for the tests of `init=`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from launch.equivalence.whole_model import whole_model
from launch.state.run import Run
from recipes.parts.data import Splits
from tests.launch.runs import make_run, single_rank
from tests.launch.tiny import FEATURES, Fit, Points
from tests.ranks import CpuWorld

KEYS = ("steps=8", "batch_size=8", "micro_batch_size=4", "optimizer=sgd", "dropout=0", "noise=0")
Tensors = dict[str, Tensor]


def tiny(recipe: str, *argv: str, world: CpuWorld | None = None) -> Run:
    """A run of one of the recipes below."""
    return make_run(
        world or single_rank(), "", f"recipe=tests.launch.checkpoint.pretrained:{recipe}", *KEYS, *argv
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


def pretrained(seed: int = 1, ties: bool = True) -> Wide:
    """A model as somebody else has trained it, from a known seed."""
    torch.manual_seed(seed)
    model = Wide(ties)
    model(torch.randn(20, FEATURES))
    return model


def unique(model: nn.Module) -> Tensors:
    """Its tensors, those that are tied once, for safetensors."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def weights_of(run: Run) -> Tensors:
    """The full tensors of a run, named as in `model.safetensors`."""
    return {
        f"{model}.{name}" if len(run.strategies) > 1 else name: tensor
        for model, strategy in run.strategies.items()
        for name, tensor in whole_model(strategy, run.world).items()
    }


def assert_same(actual: Tensors, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    """Bit by bit; with `dtype` after `expected` has been rounded to it."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.to(dtype).to(tensor.dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(actual[name], tensor), name


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """`tensors` with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def sharded(folder: Path) -> Path:
    """Shards and their index, as Hugging Face writes a large model; returns the index."""
    tensors = unique(pretrained())
    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in halves.items():
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def saved(path: Path, content: Any, **options: Any) -> Path:
    """`content` in a file of the kind that the suffix says, with `options` of torch.save; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path, **options)
    return path
