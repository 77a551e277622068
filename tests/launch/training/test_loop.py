"""The loop against raw PyTorch, and against itself on other numbers of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.equivalence.whole_model import whole_model
from launch.runtime.seeding import seed_device
from launch.training.loop import set_learning_rate
from tests.launch.runs import make_run, metric_values, read_metrics, single_rank, stream_samples, train_run
from tests.launch.tiny import FEATURES, Points, network
from tests.ranks import CpuWorld, run_ranks

Numbers = dict[str, Any]


def numbers(world: CpuWorld, folder: Path, recipe: str, words: tuple[str, ...]) -> Numbers:
    """Losses, gradient norms and final tensors of a run, on rank zero."""
    run = train_run(make_run(world, recipe, *words), folder)
    run.statistics.synchronize(run.world)
    weights = {
        f"{name}.{key}": value
        for name, held in run.strategies.items()
        for key, value in whole_model(held, world).items()
    }
    if world.rank > 0:
        return {}
    return {
        "loss": metric_values(folder),
        "grad_norm": metric_values(folder, "grad_norm"),
        "weights": weights,
    }


def on(ranks: int, folder: Path, recipe: str, *words: str) -> Numbers:
    found: Numbers = run_ranks(
        ranks, numbers, folder / f"{recipe}-{ranks}-{len(list(folder.iterdir()))}", recipe, words
    )[0]
    return found


def assert_equal(found: Numbers, expected: Numbers, tolerance: float = 1e-5) -> None:
    assert len(found["loss"]) == len(expected["loss"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        if not name.endswith("num_batches_tracked"):  # counts forward passes; nothing is computed from it
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_ranks_do_not_show(tmp_path: Path) -> None:
    """Dropout, BatchNorm and augmentation on; 50 samples, so that batches of 16 straddle the epochs."""
    words = (
        "batch_size=16",
        "micro_batch_size=4",
        "steps=8",
        "batchnorm=true",
        "dropout=0.3",
        "optimizer=sgd",
        "clip_norm=1",
    )
    single = on(1, tmp_path, "Fit", *words)
    assert "model.1.running_mean" in single["weights"]
    for ranks in (2, 4):
        assert_equal(on(ranks, tmp_path, "Fit", *words), single)
    assert on(1, tmp_path, "Fit", *words)["loss"] == single["loss"], "the same run again: the same bits"
    for other in (
        "seed=1",
        "noise=0",
    ):  # so that it is seen in the first steps already that the augmentation was on
        assert on(1, tmp_path, "Fit", *words, "steps=2", other)["loss"] != single["loss"][:2]


def test_a_single_process_is_a_raw_loop(tmp_path: Path) -> None:
    train_run(make_run(single_rank(), "Fit", "batch_size=16", "steps=8", "noise=0"), tmp_path / "run")
    seed_device(0, "weights", "model")
    model, points, losses = network(0.2, batchnorm=False), Points(50), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(8):
        indices = [index for _, index in stream_samples(50, 0, step * 16, (step + 1) * 16)]
        seed_device(0, "step", step, "model", 0)
        loss = (model(points.inputs[indices]) - points.targets[indices]).square().sum() / 16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert metric_values(tmp_path / "run") == losses


def test_accumulation_does_not_show(tmp_path: Path) -> None:
    words = ("batch_size=16", "steps=8", "dropout=0", "optimizer=sgd")
    whole = on(1, tmp_path, "Fit", *words, "micro_batch_size=16")
    assert_equal(on(1, tmp_path, "Fit", *words, "micro_batch_size=2"), whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_counts_that_differ_from_batch_to_batch(tmp_path: Path, ranks: int) -> None:
    words = ("batch_size=16", "steps=8", "dropout=0", "optimizer=sgd")
    whole = on(1, tmp_path, "Masked", *words)
    assert_equal(on(ranks, tmp_path, "Masked", *words, "micro_batch_size=2"), whole)
    unlike = on(1, tmp_path, "Fit", *words)
    assert whole["loss"] != pytest.approx(unlike["loss"], rel=1e-2), "the counts matter"


def test_counts_of_some_batches_only_are_refused(tmp_path: Path) -> None:
    run = make_run(single_rank(), "Fit", "batch_size=16", "micro_batch_size=8", "steps=1")
    counts = itertools.cycle([8, None])
    run.recipe.num_items = lambda batch: next(counts)  # type: ignore[method-assign]  # noqa: ARG005
    with pytest.raises(ValueError, match=r"Fit\.num_items gave a number for one batch and None for another"):
        train_run(run, tmp_path / "run")


def test_the_loss_on_record_is_the_mean_over_what_was_counted(tmp_path: Path) -> None:
    run = make_run(
        single_rank(), "Masked", "batch_size=16", "steps=1", "dropout=0", "noise=0", "micro_batch_size=4"
    )
    points, indices = Points(50), [index for _, index in stream_samples(50, 0, 0, 16)]
    inputs, targets = points.inputs[indices], points.targets[indices]
    weights = (inputs > 0).sum(1, keepdim=True)
    expected = ((run.models["model"](inputs) - targets).square() * weights).sum() / weights.sum()
    train_run(run, tmp_path / "run")
    assert metric_values(tmp_path / "run") == pytest.approx([expected.item()], rel=1e-6)


def test_the_schedule_reaches_each_group_in_its_ratio(tmp_path: Path) -> None:
    words = ("schedule.name=cosine", "schedule.warmup=2", "lr=0.5", "optimizer=sgd")
    run = make_run(single_rank(), "Fit", "batch_size=16", "steps=10", *words)
    groups = run.strategies["model"].optimizer.param_groups
    for step in range(10):
        run.progress.step = step
        rate = set_learning_rate(run)
        assert rate == groups[0]["lr"] == pytest.approx(0.5 * run.recipe.schedule.factor(step, 10))
        assert groups[1]["lr"] == pytest.approx(rate / 2)
    train_run(make_run(single_rank(), "Fit", "batch_size=16", "steps=10", *words), tmp_path / "run")
    rates = metric_values(tmp_path / "run", "lr")
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.5]), "the warm-up, then the peak"
    assert rates[-1] < 0.03


def test_plateau_and_early_stopping(tmp_path: Path) -> None:
    """A learning rate too small to move a weight: no evaluation is better than the first."""
    words = (
        "lr=1e-12",
        "schedule.name=plateau",
        "schedule.patience=1",
        "schedule.gamma=0.5",
        "eval.every=1",
        "eval.patience=4",
    )
    run = train_run(
        make_run(single_rank(), "Fit", "held_out=10", "batch_size=10", "steps=20", *words), tmp_path / "run"
    )
    assert metric_values(tmp_path / "run", "lr") == pytest.approx([1e-12, 1e-12, 1e-12, 5e-13, 5e-13])
    assert (run.progress.step, run.progress.best_step, run.stopping_early) == (5, 1, True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def test_what_is_due_at_the_end_of_an_epoch_and_of_the_run(tmp_path: Path) -> None:
    """50 samples in batches of 16: the steps that complete an epoch are 4 (64 > 50), 7 (112 > 100) and the
    last.
    """
    train_run(make_run(single_rank(), "Fit", "held_out=5", "batch_size=16", "steps=8"), tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "eval/loss" in line] == [4, 7, 8]


def test_a_line_of_the_record(tmp_path: Path) -> None:
    train_run(make_run(single_rank(), "Fit", "batch_size=16", "epochs=2"), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    names = ["step", "epoch", "samples", "loss", "lr", "grad_norm", "samples_per_second", "time"]
    assert all(list(line) == names for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 8)), (
        "2 epochs of 50 samples are 7 steps of 16, the last one full"
    )
    assert lines[-1]["samples"] == 7 * 16
    assert lines[-1]["epoch"] == pytest.approx(7 * 16 / 50)
    assert all(torch.tensor(line["loss"], dtype=torch.float32).item() == line["loss"] for line in lines), (
        "exact float32"
    )


def on_record_in_each_step(world: CpuWorld, folder: Path, *words: str) -> list[int]:
    """How many steps metrics.jsonl holds when the loss of each step is computed."""
    run = make_run(world, "Fit", "batch_size=8", "steps=7", *words)
    compute, found = run.recipe.loss, list[int]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if world.rank == 0:  # which has made the file
            found.append(len((folder / "metrics.jsonl").read_text().splitlines()))
        return compute(model, batch)

    run.recipe.loss = loss  # type: ignore[method-assign]  # it looks on, and computes the same
    train_run(run, folder)
    return found


def test_numbers_are_read_when_the_next_step_is_on_its_way(tmp_path: Path) -> None:
    for every, found in (("3", [0, 0, 0, 0, 3, 3, 3]), ("1", [0, 1, 2, 3, 4, 5, 6])):
        assert run_ranks(2, on_record_in_each_step, tmp_path / every, f"log.every={every}")[0] == found
    assert [line["step"] for line in read_metrics(tmp_path / "3") if "loss" in line] == list(range(1, 8))
    for name in ("loss", "grad_norm"):
        assert metric_values(tmp_path / "3", name) == metric_values(tmp_path / "1", name)


# several models ---------------------------------------------------------------------------------------------

TWO = ("batch_size=16", "steps=6", "noise=0", "lr=0.05")


def test_two_models_are_a_raw_loop(tmp_path: Path) -> None:
    train_run(make_run(single_rank(), "Pair", *TWO), tmp_path / "run")
    seed_device(0, "weights", "student")
    student = network(0.2, batchnorm=False)
    seed_device(0, "weights", "judge")
    judge, points = nn.Linear(FEATURES, 1), Points(50)
    optimizers = {
        name: torch.optim.SGD(m.parameters(), lr=0.05) for name, m in (("student", student), ("judge", judge))
    }
    expected: dict[str, list[float]] = {"judge": [], "student": []}
    for step in range(6):
        indices = [index for _, index in stream_samples(50, 0, step * 16, (step + 1) * 16)]
        inputs, targets = points.inputs[indices], points.targets[indices]

        def judged(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            loss: Tensor = (judge(inputs) - (student(inputs) - targets).abs()).square().sum()
            return loss

        def taught(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            loss: Tensor = (student(inputs) - targets).square().sum() + judge(inputs).square().sum()
            return loss

        for name, loss_function in (("judge", judged), ("student", taught)):
            seed_device(0, "step", step, name, 0)
            loss = loss_function() / 16
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            student.zero_grad()  # neither learns from the other's loss
            judge.zero_grad()
            expected[name].append(loss.item())
    for name, losses in expected.items():
        assert metric_values(tmp_path / "run", f"loss/{name}") == pytest.approx(losses, rel=1e-6)
    both = [sum(pair) for pair in zip(*expected.values(), strict=True)]
    assert metric_values(tmp_path / "run") == pytest.approx(both, rel=1e-6)


def test_ranks_do_not_show_with_two_models(tmp_path: Path) -> None:
    single = on(1, tmp_path, "Pair", *TWO, "micro_batch_size=4")
    assert any(name.startswith("judge.") for name in single["weights"])
    assert_equal(on(2, tmp_path, "Pair", *TWO, "micro_batch_size=4"), single)
