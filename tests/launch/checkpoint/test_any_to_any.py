"""One checkpoint for all: what any strategy saves on 1, 2 or 4 ranks, any other continues on 1, 2 or 4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from torch import Tensor

from launch.checkpoint.resume import resume
from launch.cli.resolve import resolve
from launch.data.prefetch import group_micro_batches
from launch.equivalence.whole_model import whole_model
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import finish, save, set_learning_rate, train_step
from tests import ranks
from tests.launch.processes import TINY
from tests.launch.runs import loop_parts
from tests.ranks import run_ranks

Phase = tuple[str, int]
PLACES: list[Phase] = [("single", 1), *product(("ddp", "fsdp", "zero1", "zero2", "zero3"), (1, 2, 4))]
RECIPES = {
    # tied embeddings, warm-up and cosine; small enough for four ranks on one core
    "gpt": ("model.layers=2", "model.width=32", "model.heads=2", "data.block=32"),
    # 16 pixels: at 8 the last BatchNorm sees so few values that it blows rounding up
    f"{TINY}:Shallow": ("data.image_size=16", "optim.lr=0.005"),
    # two models, each with an optimizer of its own
    "gan": (),
}
EVERY = ("batch_size=16", "micro_batch_size=4", "steps=4", "workers=0")
SAVED_AT = 2
RING: list[Phase] = [("zero3", 4), ("ddp", 2), ("zero2", 4), ("fsdp", 2), ("single", 1), ("zero1", 2)]
"""each writes what the next one reads, at another number of ranks than its neighbours"""
QUICK: list[tuple[Phase, Phase]] = [
    (("ddp", 2), ("fsdp", 4)),
    (("fsdp", 4), ("zero3", 2)),
    (("zero3", 2), ("single", 1)),
]


def job_at(place: ranks.CpuWorld, recipe: str, strategy: str) -> Run:
    world = World(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
    )
    return prepare(
        resolve([f"recipe={recipe}", f"strategy={strategy}", *EVERY, *RECIPES[recipe]], world), world
    )


def steps(run: Run, stop: int) -> list[float]:
    """The steps up to `stop`: losses and gradient norms, and how far the last one has moved the weights of
    each model.

    The last needs the optimizer's state: a momentum that was lost would show in the loss only a step later.
    """
    run.stop_at = stop
    found: list[float] = []
    for batches in group_micro_batches(run.train_loader(), run.batch_plan.accumulation_steps):
        before = weights(run)
        set_learning_rate(run)
        losses, norms = train_step(run, batches)
        run.progress.step += 1
        found += [loss.item() for loss in run.reduced_losses(losses).values()] + [
            norm.item() for norm in norms.values()
        ]
    after = weights(run)
    return found + [
        sum(float((after[model][n] - w).double().square().sum()) for n, w in held.items())
        for model, held in before.items()
    ]


def weights(run: Run) -> dict[str, dict[str, Tensor]]:
    """The parameters by model, whole, on rank zero."""
    found = {}
    for model, strategy in run.strategies.items():
        parameters = {name for name, _ in strategy.module.named_parameters()}
        found[model] = {
            name: tensor for name, tensor in whole_model(strategy, run.world).items() if name in parameters
        }
    return found


def write(place: ranks.CpuWorld, recipe: str, strategy: str, folder: Path) -> list[float]:
    """The first steps, then a checkpoint."""
    run = job_at(place, recipe, strategy)
    found = steps(run, SAVED_AT)
    if run.world.rank == 0:
        folder.mkdir()
    parts = loop_parts(run, folder)
    save(run, *parts)
    finish(run, *parts)
    return found


def read(
    place: ranks.CpuWorld, recipe: str, strategy: str, folders: list[Path], elsewhere: Path
) -> list[list[float]]:
    """The other steps, after the checkpoint of each run in `folders`."""
    run = job_at(place, recipe, strategy)
    found = []
    for folder in folders:
        run.config.resume = str(folder)
        assert resume(run, elsewhere) is not None
        assert run.progress.step == SAVED_AT
        found.append(steps(run, SAVED_AT + 1))
    return found


def whole(place: ranks.CpuWorld, recipe: str) -> list[list[float]]:
    """The steps before the save and those after it, without interruption, in one process."""
    run = job_at(place, recipe, "single")
    return [steps(run, SAVED_AT), steps(run, SAVED_AT + 1)]


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
    written.cache_clear()


@cache
def written(recipe: str, place: Phase, runs: Path) -> Path:
    """A run saved by `place`. Its steps before must be those of all others."""
    folder = runs / f"{Path(recipe).name}-{place[0]}-{place[1]}"
    found = run_ranks(place[1], write, recipe, place[0], folder)[0]
    check_equal(found, expected(recipe)[0])
    return folder


@cache
def expected(recipe: str) -> list[list[float]]:
    return list(run_ranks(1, whole, recipe)[0])


def check_equal(mine: list[float], theirs: list[float]) -> None:
    """Losses and norms to 1e-5, relative; movements, which are differences of close numbers, to 1e-4."""
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert mine[:-2] == pytest.approx(theirs[:-2], rel=1e-5)


def check(recipe: str, writers: list[Phase], reader: Phase, runs: Path) -> None:
    folders = [written(recipe, writer, runs) for writer in writers]
    found = run_ranks(reader[1], read, recipe, reader[0], folders, runs / "elsewhere")[0]
    for mine in found:
        check_equal(mine, expected(recipe)[1])


@pytest.mark.parametrize(("writer", "reader"), QUICK)
def test_a_checkpoint_goes_on_under_another_strategy_and_world_size(
    writer: Phase, reader: Phase, runs: Path
) -> None:
    check("gpt", [writer], reader, runs)


@pytest.mark.slow
@pytest.mark.parametrize("reader", PLACES)
def test_every_place_reads_every_other(reader: Phase, runs: Path) -> None:
    check("gpt", PLACES, reader, runs)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [f"{TINY}:Shallow", "gan"], ids=["resnet", "gan"])
@pytest.mark.parametrize(("writer", "reader"), list(zip(RING, RING[1:] + RING[:1], strict=True)))
def test_statistics_and_several_models_go_on_too(
    recipe: str, writer: Phase, reader: Phase, runs: Path
) -> None:
    """What a tensor is does not depend on who wrote it: that each place reads each other shows above."""
    check(recipe, [writer], reader, runs)
