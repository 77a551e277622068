"""`tests/benchmarks/gpu.py`, on a machine that has no GPU: what can be right or wrong without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu_rows import LEFT_OUT, GpuSettings, timing
from tests.benchmarks.gpu_rows.gpu_workloads import GPT2, GpuWorkload, NaiveAttention
from tests.benchmarks.gpu_rows.optimizations import (
    LOSS_TOLERANCE,
    OPTIMIZATIONS,
    flops_of_sample,
    variants,
    with_fitting_batch,
)
from tests.benchmarks.gpu_rows.timing import PROBE, WARM_UP, timed_window
from tests.launch.processes import PATIENCE, ROOT

TOY = GpuSettings(device="cpu", rehearse=True, seconds=0.0, rounds=1, mnist=None)
REAL = GpuSettings(device="cpu", rehearse=False, seconds=3.0, rounds=1, mnist=None)


def rows_of(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """What the benchmark keeps of a run without a GPU that must succeed."""
    command = [sys.executable, "tests/benchmarks/gpu.py", f"json={tmp_path / 'rows.json'}", *words]
    places = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=ROOT, env=places, capture_output=True, text=True, timeout=PATIENCE * 300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    return rows


@pytest.mark.slow
def test_without_a_gpu_no_row_has_a_figure(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert {row["note"] for row in rows} == {"no GPU"}
    assert all(set(row) == {"section", "row", "aim", "note"} for row in rows)


@pytest.mark.slow
def test_each_row_comes_through_a_rehearsal(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "rehearse=true")
    assert {row["section"] for row in rows} == {"limits", *OPTIMIZATIONS, "loop", "checkpoint", "mnist"}
    without_zero = f"{LEFT_OUT}: deepspeed is not installed"
    for row in rows:
        absent = "zero" in row["row"] and find_spec("deepspeed") is None
        assert row["note"] == (without_zero if absent else "rehearsal"), row
        assert set(row) == {"section", "row", "aim", "losses", "note"}, "a figure of a CPU"
        lowest = row["section"] in OPTIMIZATIONS and row["row"] == next(iter(OPTIMIZATIONS[row["section"]]))
        if (row["section"] in OPTIMIZATIONS and not lowest) or (row["section"] == "loop" and not absent):
            assert (
                row["losses"]
                <= LOSS_TOLERANCE[
                    row["row"].partition(",")[0] if row["section"] == "loop" else row["section"]
                ]
            )


def test_attention_by_hand_is_attention() -> None:
    """To rounding in fp32, forward and backward, from the same weights."""
    found = []
    for naive in (True, False):
        workload = GPT2(
            vocabulary=255, block=32, width=64, heads=2, layers=2, naive=naive, batch=8, samples=16
        )
        model = workload.initial_model()
        assert any(isinstance(module, NaiveAttention) for module in model.modules()) == naive
        loss = workload.mean_loss(model, next(workload.on_device()))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has left it so
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_operations_of_gpt2_are_those_of_the_textbook() -> None:
    """6 for each weight of a matrix and token, and 12 x layers x width x length for attention (Chowdhery et
    al. 2022).
    """
    layers, width, length, vocabulary = 12, 768, 1024, 50257
    weights = layers * 12 * width**2 + vocabulary * width
    assert flops_of_sample(REAL, "gpt") == length * (6 * weights + 12 * layers * width * length)


def test_tiled_batches_have_the_mean_loss_of_any_size() -> None:
    (_, workload), *_ = variants(TOY, "gpt")
    sizes = [replace(workload, batch=size, tiled=1) for size in (8, 32)]
    small, large = (
        workload.mean_loss(workload.initial_model(), next(workload.on_device())).item() for workload in sizes
    )
    assert small == pytest.approx(large, rel=1e-6)


def test_a_window_is_as_long_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that steps alone move on: 0.2 s of steps of 0.01 s."""
    step_seconds: list[float] = []
    clock = 0.0
    monkeypatch.setattr(timing, "synchronized_time", lambda _: clock)
    steps = 0
    for steps in timed_window(count(1), "cpu", 0.2, step_seconds):  # noqa: B007  # the last one counts
        clock += 0.01
    assert steps == WARM_UP + PROBE + 20
    assert step_seconds == [pytest.approx(0.01)]
    monkeypatch.undo()
    assert len(list(timed_window(count(), "cpu", 0.0, []))) == WARM_UP + 2 * PROBE


def test_a_batch_that_does_not_fit_is_halved() -> None:
    def run(workload: GpuWorkload, fits: int) -> int:
        if workload.batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return workload.batch

    assert with_fitting_batch(GpuWorkload(batch=64), partial(run, fits=16)) == 16
    with pytest.raises(torch.OutOfMemoryError):
        with_fitting_batch(GpuWorkload(batch=64), partial(run, fits=0))
