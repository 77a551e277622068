"""Evaluation counts each sample once: on any number of ranks, the numbers of a single process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchmetrics import classification, regression

from launch.training.evaluate import evaluate
from tests.launch.runs import make_run, single_rank
from tests.launch.tiny import CLASSES, Points
from tests.ranks import CpuWorld, run_ranks

ALL_SIZES = (*range(1, 14), 24, 25, 35, 36, 37, 40)
"""what is left over for 2, 3 and 4 ranks of 3 samples a micro-batch, and around whole batches"""
SOME_SIZES = (1, 4, 13, 37)
CUT = ("batch_size=36", "micro_batch_size=3", "steps=1")


def scores(world: CpuWorld, recipe: str, sizes: list[int]) -> list[dict[str, Any]]:
    run = make_run(world, recipe, "held_out=2", *CUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a rank may have no samples of its own
        return [evaluate(run, Points(size, classes=recipe == "Sort")) or {} for size in sizes]


def by_hand(recipe: str, size: int) -> dict[str, Any]:
    """The whole data set in one batch, raw PyTorch and torchmetrics, in float64."""
    points, model = (
        Points(size, classes=recipe == "Sort"),
        make_run(single_rank(), recipe, *CUT).models["model"].eval(),
    )
    with torch.no_grad():
        outputs = model(points.inputs).double()
    if recipe == "Sort":
        return {
            "loss": F.cross_entropy(outputs, points.targets).item(),
            "accuracy": classification.MulticlassAccuracy(CLASSES, average="micro")(
                outputs, points.targets
            ).item(),
            "f1": classification.MulticlassF1Score(CLASSES, average="macro")(outputs, points.targets).item(),
            "confusion": classification.MulticlassConfusionMatrix(CLASSES)(outputs, points.targets).tolist(),
        }
    flat, targets = outputs.flatten(), points.targets.flatten().double()
    return {
        "loss": F.mse_loss(flat, targets).item(),
        "mse": F.mse_loss(flat, targets).item(),
        "mae": F.l1_loss(flat, targets).item(),
        "r2": regression.R2Score().set_dtype(torch.float64)(flat, targets).item(),
    }


@pytest.mark.parametrize("recipe", ["Sort", "Fit"])
@pytest.mark.parametrize(
    "tried", [SOME_SIZES, pytest.param(ALL_SIZES, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_any_number_of_ranks_gives_the_numbers_of_one_exactly(recipe: str, tried: Sequence[int]) -> None:
    sizes = [size for size in tried if recipe == "Sort" or size > 1]  # R2 of one sample is not defined
    expected = run_ranks(1, scores, recipe, sizes)[0]
    for ranks in (2, 3, 4):
        for found in run_ranks(ranks, scores, recipe, sizes):
            for size, mine, single in zip(sizes, found, expected, strict=True):
                loss, single_loss = (
                    torch.tensor(score.pop("loss"), dtype=torch.float32)
                    for score in (dict(mine), dict(single))
                )
                assert torch.equal(loss, single_loss), (ranks, size)
                assert {**mine, "loss": 0} == {**single, "loss": 0}, (ranks, size)
    if recipe == "Sort":
        assert [sum(map(sum, score["confusion"])) for score in expected] == sizes, "the count is the size"
    for size, score in zip(sizes, expected, strict=True):
        for name, value in by_hand(recipe, size).items():
            assert score[name] == (value if name == "confusion" else pytest.approx(value, rel=1e-5)), (
                name,
                size,
            )
    assert len({score["loss"] for score in expected}) == len(sizes), "the test can tell sizes apart"


def test_metrics_work_without_a_process_group() -> None:
    assert not torch.distributed.is_initialized()
    found = scores(single_rank(), "Sort", [7])[0]
    assert sum(map(sum, found["confusion"])) == 7


def test_the_models_are_in_training_mode_again() -> None:
    run = make_run(single_rank(), "Fit", "held_out=4", *CUT)
    evaluate(run, Points(4))
    assert run.models["model"].training
