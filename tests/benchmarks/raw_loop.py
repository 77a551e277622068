"""A training loop without rankzero, to compare with: data, model, optimizer and loss of a recipe, torch for
the rest, DeepSpeed for ZeRO.

    torchrun --nproc_per_node=2 tests/benchmarks/raw_loop.py recipe=mnist strategy=ddp batch_size=64 steps=1

Prints the time (seconds since 1970) at which the first step was done. It imports nothing of rankzero but the
recipe.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from recipes import RECIPES
from recipes.base import Recipe, local_num_items


def train(recipe: Recipe, strategy: str, batch_size: int, steps: int, save: Path | None = None) -> float:
    """`batch_size` is that of all ranks. Returns when the first step was done; at the end each rank saves
    what it holds.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if strategy != "single":
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    dataset: Any = recipe.build_data().train
    module = recipe.build_model().to(device)
    model, optimizer = wrap_model(recipe, module, strategy, batch_size // ranks)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank)
    loader = DataLoader(dataset, batch_size=batch_size // ranks, sampler=sampler, drop_last=True)
    first, step = 0.0, 0
    while step < steps:
        for batch in loader:
            batch = [part.to(device) for part in batch]
            loss = recipe.loss(model, batch) / local_num_items(recipe, batch)
            if strategy.startswith("zero"):
                model.backward(loss)
                model.step()
            else:
                loss.backward()  # type: ignore[no-untyped-call]  # torch has left it so
                torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            step, first = step + 1, first or time.time()
            if step == steps:
                break
    if save is not None and strategy.startswith("zero"):
        model.save_checkpoint(save)
    elif save is not None:
        torch.save(
            {"model": module.state_dict(), "optimizer": optimizer.state_dict()}, save / f"rank-{rank}.pt"
        )
    return first


def wrap_model(recipe: Recipe, module: torch.nn.Module, strategy: str, micro_batch: int) -> tuple[Any, Any]:
    """The model to call and the optimizer."""
    if strategy == "single":
        return module, recipe.build_optimizer(module)
    if strategy == "ddp":
        return DistributedDataParallel(module), recipe.build_optimizer(module)
    from tests.benchmarks.loops import raw_strategies  # with all that FSDP2 and DeepSpeed import

    return raw_strategies.wrap_model(recipe, module, strategy, micro_batch)


def built_in(name: str) -> Recipe:
    """A recipe with its defaults."""
    module = import_module(RECIPES[name])
    classes = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, Recipe)]
    recipe: Recipe = next(item() for item in classes if item.__module__ == module.__name__)
    return recipe


@dataclass(kw_only=True)
class Options:
    """The options of this script."""

    recipe: str = "mnist"
    """a recipe that is built in"""
    strategy: str = "single"
    """single, ddp, fsdp, zero2 or zero3"""
    batch_size: int = 64
    """samples of a step, over all ranks"""
    steps: int = 1
    """optimizer steps"""


def main(argv: list[str]) -> None:
    """Train; rank zero prints the time of the first step."""
    if {"--help", "-h"} & set(argv):  # only then: its start is measured without anything of rankzero's
        from launch.cli.command import read_command

        read_command(argv, __doc__, Options, name="raw_loop.py")
    line = {**vars(Options()), **dict(argument.split("=", 1) for argument in argv)}
    first = train(built_in(line["recipe"]), line["strategy"], int(line["batch_size"]), int(line["steps"]))
    if os.environ.get("RANK", "0") == "0":
        print(first, flush=True)
    os._exit(0)  # as run.py does: a clean exit may take seconds


if __name__ == "__main__":
    main(sys.argv[1:])
