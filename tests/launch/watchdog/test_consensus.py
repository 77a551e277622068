"""What one rank requests, all ranks do at the same step."""

from __future__ import annotations

from launch.runtime.world import World as LaunchWorld
from launch.watchdog.consensus import Consensus
from tests.ranks import CpuWorld, run_ranks


def exchange(world: CpuWorld, requests: list[list[str]]) -> list[set[str]]:
    consensus = Consensus(LaunchWorld(rank=world.rank, world_size=world.world_size), ["save", "stop"])
    return [
        *(consensus.exchange(request if world.rank == 1 else []) for request in requests),
        consensus.close(),
    ]


def test_a_request_of_one_rank_reaches_all_a_step_later() -> None:
    received = run_ranks(3, exchange, [[], ["stop"], [], ["save", "stop"]])
    assert received[0] == received[1] == received[2] == [set(), set(), {"stop"}, set(), {"save", "stop"}]


def calls_that_receive(world: CpuWorld, calls: int, period: float) -> list[int]:
    """In which of `calls` calls a lasting request of rank one was received: those after an exchange."""
    consensus = Consensus(LaunchWorld(rank=world.rank, world_size=world.world_size), ["save", "stop"], period)
    received = [
        call for call in range(calls) if consensus.exchange(["stop"] if world.rank == 1 else [], seldom=True)
    ]
    consensus.close()
    return received


def test_short_steps_are_not_asked_after_one_by_one() -> None:
    """Pauses of 1, 3, 7, 15 and then 31 calls, the same ones on both ranks; an answer comes a call later."""
    assert run_ranks(2, calls_that_receive, 100, 1e9) == [[1, 3, 7, 15, 31, 63, 95]] * 2


def test_long_steps_are_asked_after_each() -> None:
    assert run_ranks(2, calls_that_receive, 10, 0.0) == [list(range(1, 10))] * 2


def evaluation_between(world: CpuWorld) -> list[int]:
    consensus = Consensus(LaunchWorld(rank=world.rank, world_size=world.world_size), ["stop"], 1e9)
    for _ in range(60):
        consensus.exchange([], seldom=True)
    return [call for call in range(6) if consensus.exchange(["stop"] if world.rank == 1 else [])]


def test_in_an_evaluation_each_batch_asks() -> None:
    assert run_ranks(2, evaluation_between) == [[1, 2, 3, 4, 5]] * 2
