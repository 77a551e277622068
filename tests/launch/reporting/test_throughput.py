"""What is said of a run's speed, and that it is so."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.reporting.mfu import PEAK_FLOPS, count_flops
from launch.reporting.throughput import StartupTimer, StepTimer, StepTimes, peak_memory, process_age
from launch.training.loop import finish, train
from tests.benchmarks.dense_run import Dense, prepared
from tests.launch.processes import TINY, run_command


def test_percentiles_are_within_a_percent() -> None:
    times = StepTimes()
    for millisecond in range(1, 1001):
        times.add(millisecond / 1000)
    assert times.percentile(0.5) == pytest.approx(0.5, rel=0.011)
    assert times.percentile(0.99) == pytest.approx(0.99, rel=0.011)
    times.add(7.0, steps=9000)
    assert times.percentile(0.5) == pytest.approx(7, rel=0.011)
    assert StepTimes().percentile(0.5) == 0.0


def test_flops_are_those_of_the_textbook() -> None:
    with prepared(Dense(width=64, layers=3, samples=16)) as (run, _):
        batch = [torch.empty(16, 64, device="meta")] * 2
        # each layer: forward, gradient of the weights, and of the input but for the first
        assert count_flops(run.recipe, batch) == 2 * 16 * 64 * 64 * (3 + 3 + 2)


def test_a_model_that_needs_numbers_is_not_counted() -> None:
    class Depends(Dense):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            loss = super().loss(model, batch)
            return loss if loss > 1 else 2 * loss

    with prepared(Depends(width=8, samples=4)) as (run, _):
        assert count_flops(run.recipe, [torch.empty(4, 8, device="meta")] * 2) is None


def test_waiting_for_data_is_told_from_the_steps() -> None:
    def slow() -> Iterator[list[Any]]:
        for _ in range(6):
            time.sleep(0.02)
            yield [[torch.zeros(16, 8)]]

    with prepared(Dense(samples=16)) as (run, _):
        timer = StepTimer(run)
        began = time.perf_counter()
        for number, _ in enumerate(timer.data(slow())):
            time.sleep(0.5 if number == 0 else 0.01)  # the first compiles
            timer.step()
        total = time.perf_counter() - began
        # a busy machine sleeps longer than it was asked to, never shorter
        assert timer.waited_s >= 5 * 0.02
        assert timer.busy_s - timer.waited_s >= 5 * 0.01
        assert timer.busy_s <= total - 0.5 - 0.02, "without the first"
        assert "workers=2" in next(timer.summary())
        assert timer.items_per_sample == 1.0


def test_the_parts_of_the_start_add_up() -> None:
    startup = StartupTimer()
    for part in ("imports", "ranks"):
        time.sleep(0.01)
        startup.reached(part)
    assert sum(startup.parts.values()) == pytest.approx(startup.last)
    assert 0 < startup.parts["ranks"] < startup.parts["imports"]
    assert startup.last <= process_age() < time.monotonic()
    assert 1e7 < peak_memory("cpu") < 1e12


def test_no_peak_hides_another() -> None:
    names = list(PEAK_FLOPS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b], (
        "the more special first"
    )


@pytest.mark.slow
def test_the_summary_says_it(tmp_path: Path) -> None:
    ended = run_command(
        f"recipe={TINY}:Fit", "steps=12", "batch_size=16", "log.every=5", "run_dir=run", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    for words in (
        ", p99 ",
        "of the time waiting for data",
        "GFLOP/s per rank",
        "peak memory",
        "first step",
    ):
        assert words in ended.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["samples_per_second"] > 0 for line in lines if "loss" in line)


def test_no_garbage_is_collected_in_a_step() -> None:
    """But in evaluations, and by hand between steps; afterwards all is as it was."""
    seen: dict[str, bool] = {}
    collected: list[int] = []

    class Looks(Dense):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            seen.setdefault("train" if model.training else "eval", gc.isenabled())
            return super().loss(model, batch)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        with prepared(Looks(samples=16)) as (run, parts):
            run.splits.val = run.splits.train
            run.stop_at = 12
            train(run, *parts)
    finally:
        gc.callbacks.remove(note)
    assert seen == {"train": False, "eval": True}
    assert 1 in collected, "what is young, with a line on the screen"
    assert gc.isenabled()


def test_a_run_that_stops_is_saved_before_anything_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that a scheduler leaves is for saving: counting the operations of a large model may take
    longer.
    """
    monkeypatch.setattr(StepTimer, "summary", lambda _: pytest.fail("summed up"))
    with prepared(Dense(samples=16)) as (run, parts):
        run.stop_at = 2
        train(run, *parts)
        finish(run, *parts)
        assert parts.metrics.saves[-1].step == 2
