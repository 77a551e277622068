"""`micro_batch_size=auto`: memory that runs out on one rank makes all ranks restart with smaller
micro-batches.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.cli.config import Config
from launch.cli.resolve import resolve
from launch.runtime.phase import Phase
from launch.runtime.restarts import attempt_id, restart_count
from launch.runtime.world import World
from launch.watchdog import auto_micro_batch
from tests.launch.processes import (
    TINY,
    CommandResult,
    descendants,
    free_port,
    run_command,
    start_command,
    wait_for_command,
)
from tests.launch.runs import metric_values, read_metrics, uninterrupted_losses

FIT = (f"recipe={TINY}:Fit", "batch_size=16", "steps=8", "checkpoint.every=3", "dropout=0", "workers=0")
AUTO = (*FIT, "micro_batch_size=auto", "run_dir=run")


def two() -> World:
    return World(world_size=2, local_world_size=2)


@pytest.mark.parametrize(
    ("batch", "now", "smaller"),
    [(64, 32, 16), (64, 1, None), (36, 18, 9), (36, 9, 3), (28, 14, 7), (28, 7, 2), (10, 5, 1)],
)
def test_sizes_that_cut_the_batch_on_two_ranks(batch: int, now: int, smaller: int | None) -> None:
    assert auto_micro_batch.smaller(Config(batch_size=batch, micro_batch_size=now), two()) == smaller


@pytest.mark.parametrize(
    ("remembered", "ranks", "size"), [(None, 2, 32), (8, 2, 8), (8, 1, 8), (32, 4, 16), ("auto", 1, 64)]
)
def test_a_size_that_was_found_is_started_with(
    tmp_path: Path, remembered: Any, ranks: int, size: int
) -> None:
    if remembered is not None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"micro_batch_size": remembered}))
    assert auto_micro_batch.first_size(Config(batch_size=64), World(world_size=ranks), tmp_path) == size


def test_what_is_no_lack_of_memory_or_not_helped_by_a_smaller_batch_stays_a_failure() -> None:
    config, full = Config(batch_size=8, micro_batch_size=8), torch.OutOfMemoryError("CUDA out of memory.")
    here = Phase(step=3, name="backward")
    report = auto_micro_batch.restart_report(full, config, World(), here)
    assert report is not None
    assert report.micro_batch_size == 4
    assert auto_micro_batch.restart_report(RuntimeError("shapes differ"), config, World(), here) is None
    assert auto_micro_batch.restart_report(full, config, World(), Phase(step=3, name="save")) is None
    assert auto_micro_batch.restart_report(full, config, World(), Phase()) is None, (
        "the model itself is too large"
    )
    assert (
        auto_micro_batch.restart_report(full, Config(batch_size=8, micro_batch_size=1), World(), here) is None
    )


def test_attempts_are_told_apart_and_counted() -> None:
    environment = {"TORCHELASTIC_RESTART_COUNT": "1", "RANKZERO_RESTART_COUNT": "2"}
    assert (restart_count({}), restart_count(environment)) == (0, 3)
    assert len({attempt_id({}), attempt_id(environment), attempt_id({"RANKZERO_RESTART_COUNT": "1"})}) == 3


@pytest.mark.parametrize("other", ["ddp.static_graph=true", "compile=reduce-overhead"])
def test_what_forbids_accumulation_is_refused(other: str) -> None:
    with pytest.raises(
        ValueError, match=f"micro_batch_size=auto may lead to accumulation, and {other} does not go with it"
    ):
        resolve([*AUTO, other], two())


# real processes ---------------------------------------------------------------------------------------------


def gone_on(cwd: Path, ended: CommandResult, rank: int, was: int, now: int) -> None:
    """The run has come to its end with the smaller size, and says so once."""
    assert ended.returncode == 0, ended.stderr
    assert len(ended.messages) == 1, ended.stderr
    reason = rf"rank {rank} on \S+ ran out of memory in step 5, forward, with micro_batch_size={was}"
    assert re.search(f"{reason}; all ranks restart with {now}", ended.messages[0])
    assert "(continues run/checkpoints/step-00000003 at step 3)" in ended.stdout
    assert yaml.safe_load((cwd / "run" / "config.yaml").read_text())["micro_batch_size"] == now
    assert not (cwd / "run" / "failure.json").exists()
    assert [line["step"] for line in read_metrics(cwd / "run") if "loss" in line] == list(range(1, 9))
    assert not descendants(cwd)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a process that had memory enough."""
    return uninterrupted_losses(tmp_path_factory.mktemp("whole") / "run", *FIT)


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_goes_on_with_half_the_micro_batch(
    tmp_path: Path, whole: list[float]
) -> None:
    gone_on(tmp_path, run_command(*AUTO, "chaos=oom:rank=0,step=5", cwd=tmp_path), 0, 16, 8)
    assert metric_values(tmp_path / "run") == pytest.approx(whole, rel=1e-6), "the curve is the same"
    again = run_command(*AUTO, "steps=9", cwd=tmp_path)
    assert "16 = 8 micro x 2 accumulation" in again.stdout, "the size is remembered"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])  # the other rank waits in backward, or in forward
def test_all_ranks_under_torchrun_restart_together(tmp_path: Path, whole: list[float], strategy: str) -> None:
    ended = run_command(*AUTO, f"strategy={strategy}", "chaos=oom:rank=1,step=5", cwd=tmp_path, ranks=2)
    gone_on(tmp_path, ended, 1, 8, 4)
    assert metric_values(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_whose_store_is_rank_zeros_own_restart_too(tmp_path: Path, rank: int) -> None:
    """Started without torchrun; `resume=none` is for the first attempt."""
    phase = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    args = (*AUTO, "resume=none", f"chaos=oom:rank={rank},step=5")
    processes = [
        start_command(*args, cwd=tmp_path, env={**phase, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(2)
    ]
    first, second = (wait_for_command(process) for process in processes)
    assert (second.returncode, second.stdout, second.messages) == (0, "", [])
    gone_on(tmp_path, first, rank, 8, 4)


@pytest.mark.slow
def test_memory_that_really_runs_out_is_halved_until_it_suffices(tmp_path: Path) -> None:
    ended = run_command(
        f"recipe={TINY}:Greedy",
        "batch_size=16",
        "steps=3",
        "micro_batch_size=auto",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert [line.rpartition(" ")[2] for line in ended.messages] == ["8", "4"]
    assert "16 = 4 micro x 4 accumulation" in ended.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]


@pytest.mark.slow
def test_what_does_not_fit_one_by_one_is_a_failure(tmp_path: Path) -> None:
    ended = run_command(
        f"recipe={TINY}:Greedy",
        "gigabytes=6",
        "batch_size=2",
        "steps=3",
        "micro_batch_size=auto",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert "all ranks restart with 1" in ended.messages[0]
    assert re.search("step 1, forward: RuntimeError: .*can't allocate memory", ended.messages[1])
