"""The pool of ranks: what it promises to every other distributed test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, distributed

from tests import ranks
from tests.ranks import CpuWorld, RanksFailed, run_ranks


def summed(world: CpuWorld, tensor: Tensor) -> tuple[int, Tensor]:
    value = tensor * (world.rank + 1)
    distributed.all_reduce(value)
    return world.rank, value


class Unlucky(LookupError):
    """Takes its time to say so: whoever fails because of it is heard first."""

    def __str__(self) -> str:
        time.sleep(0.3)
        return super().__str__()


def raises_on(world: CpuWorld, rank: int) -> None:
    if world.rank == rank:
        raise Unlucky(f"no luck on {world.rank}")
    distributed.barrier()


def dies_on(world: CpuWorld, rank: int, how: str) -> None:
    if world.rank == rank:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)


def hangs_on(world: CpuWorld, rank: int) -> None:
    if world.rank == rank:
        time.sleep(60)


def place(_: CpuWorld) -> tuple[int, int, str]:
    return os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_call_gets_a_group_of_its_own_size(world_size: int) -> None:
    answers = run_ranks(world_size, summed, torch.tensor([1.0, 2.0]))
    total = world_size * (world_size + 1) / 2
    assert [rank for rank, _ in answers] == list(range(world_size))
    assert all(torch.equal(value, torch.tensor([total, 2 * total])) for _, value in answers)


def test_workers_are_reused_and_single_threaded() -> None:
    first, second = run_ranks(2, place), run_ranks(2, place)
    assert first == second
    assert all(threads == 1 and variable == "1" for _, threads, variable in first)


def test_an_exception_comes_back_with_rank_and_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"no luck on 1") as caught:
        run_ranks(2, raises_on, 1)
    assert list(caught.value.errors) == [1, 0], "the cause, then what it has led to"
    assert "in raises_on" in caught.value.errors[1]
    assert run_ranks(2, summed, torch.ones(1))[0][1].item() == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("kill", -9)])
def test_a_dead_worker_fails_the_test_and_the_pool_recovers(how: str, code: int) -> None:
    with pytest.raises(RanksFailed, match=f"the process died, exit code {code}"):
        run_ranks(2, dies_on, 1, how)
    assert run_ranks(2, summed, torch.ones(1))[1][1].item() == 3.0


@pytest.mark.slow
def test_a_hanging_worker_fails_the_test_and_the_pool_recovers() -> None:
    with pytest.raises(RanksFailed, match=r"no answer since its start \(6 s\)") as caught:
        run_ranks(2, hangs_on, 1, timeout=6.0)
    assert list(caught.value.errors) == [1]
    assert run_ranks(1, summed, torch.ones(1))[0][1].item() == 1.0


@pytest.mark.slow
def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks.shut_down()
    monkeypatch.setattr("tests.ranks.PRELOADED_MODULES", ("torch",))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, environment = set(psutil.Process().children(recursive=True)), dict(os.environ)
    pids = [pid for pid, _, _ in run_ranks(4, place)]
    assert all(psutil.pid_exists(pid) for pid in pids)
    ranks.shut_down()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    # the resource tracker of multiprocessing belongs to the interpreter and ends with it
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if "resource_tracker" not in " ".join(process.cmdline())]
    assert dict(os.environ) == environment
    assert not list(tmp_path.iterdir())
