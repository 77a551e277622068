"""What the tables show of a step, and which keys are suggested."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.profiling.key_suggestions import suggest
from launch.profiling.measure import RankStepTimes
from launch.profiling.step_table import explanations, step_table
from launch.state.run import Run
from strategies.options import StrategyName
from tests.launch.runs import make_run, single_rank


def step_times(**given: float) -> RankStepTimes:
    """A step of 100 ms in which nothing stands out, but for what is given."""
    usual = {"unprofiled_step": 98.0, "step": 100.0, "compute": 90.0, "idle": 10.0, "peak_memory": 1e9}
    return RankStepTimes(**{**dict.fromkeys(RankStepTimes._fields, 0.0), **usual, **given})


def suggestions(run: Run, *rows: RankStepTimes, gpu: bool = True) -> str:
    return "\n".join(suggest(replace(run, world=replace(run.world, device="cuda:0")) if gpu else run, rows))


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(single_rank(), "Fit", "batch_size=32", "micro_batch_size=8", "steps=5")


def test_a_step_that_computes_needs_nothing(run: Run) -> None:
    assert (
        suggestions(run, step_times())
        == "nothing stands out: 90% of a step is computing; precision=bf16 or tf32 computes faster"
    )
    assert suggestions(run, step_times(), gpu=False) == "nothing stands out: 90% of a step is computing"


def test_exposed_communication_names_keys_of_the_strategy(run: Run) -> None:
    row = step_times(compute=70, exposed_communication=20)
    keys: dict[StrategyName, str] = {
        "ddp": "ddp.compress=bf16",
        "fsdp": "fsdp.shard=grad",
        "zero3": "strategy=zero2",
    }
    for strategy, key in keys.items():
        printed = suggestions(replace(run, config=replace(run.config, strategy=strategy)), row, row)
        assert printed.startswith("20% of a step is exposed communication")
        assert key in printed
        assert "micro_batch_size=16" in printed


def test_waiting_for_a_slow_rank_is_no_communication(run: Run) -> None:
    rows = [
        step_times(compute=60, communication=30, exposed_communication=30),
        step_times(compute=85, communication=5, exposed_communication=5),
    ] * 2
    printed = suggestions(run, *rows)
    assert "12.50 of 17.50 ms of exposed communication are waiting for a slower rank, rank 1" in printed
    assert "5.00 ms" in "".join(explanations(rows, gpu=True))


def test_an_idle_gpu_is_told_what_fills_it(run: Run) -> None:
    printed = suggestions(run, step_times(compute=60, idle=40))
    assert printed.startswith("40% of a step is idle")
    assert "compile=true" in printed
    waiting = suggestions(run, step_times(compute=60, idle=40, data=30))
    assert waiting.startswith("30% of a step is waiting for data")
    assert "data" not in suggestions(run, step_times(compute=99, idle=1, data=30)), (
        "the host has time to wait"
    )


def test_copies_name_what_offloads(run: Run) -> None:
    row = step_times(compute=80, exposed_copies=10)
    assert ".item()" in suggestions(run, row)
    offloading = replace(run.config, strategy="fsdp", fsdp=replace(run.config.fsdp, cpu_offload=True))
    assert "fsdp.cpu_offload=false" in suggestions(replace(run, config=offloading), row)


def test_a_gpu_without_a_kernel_was_not_seen(run: Run) -> None:
    assert "saw no kernel" in suggestions(run, step_times(compute=0, idle=100))


def test_the_table_names_the_ranks_with_least_and_most() -> None:
    table = step_table(
        [
            step_times(exposed_communication=4, communication=6),
            step_times(exposed_communication=1, communication=6),
        ],
        gpu=True,
    )
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("exposed communication", "2.50", "2.5%", "1.00 (1)", "4.00 (0)") in cells
    assert not [row for row in cells if "copies" in str(row[0])], "there are none"
