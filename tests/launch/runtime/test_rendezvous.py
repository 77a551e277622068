"""The rendezvous: ranks that are missing or differ are named, within seconds, before any collective."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # its stubs forget them

from launch.runtime.rendezvous import RendezvousError, check_ranks, differing_ranks
from launch.runtime.store import spans
from launch.runtime.world import World
from tests.launch.processes import (
    PATIENCE,
    ROOT,
    TINY,
    CommandResult,
    free_port,
    start_command,
    wait_for_command,
)

SAME = {
    "host": "n1",
    "gpu": "",
    "world_size": 2,
    "python": "3.12",
    "torch": "2.14.1",
    "rankzero": "0.1.0",
} | dict.fromkeys(("deepspeed", "code", "configuration"), "same")


@pytest.fixture
def store() -> TCPStore:
    return TCPStore(
        "127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE * 20)
    )


def called(
    store: TCPStore, reports: list[Mapping[str, Any]], world_size: int, timeout: float = PATIENCE * 6
) -> list[str]:
    """What each rank is answered; ranks are threads, each with a connection of its own."""
    answers = [""] * len(reports)
    times = [0.0] * len(reports)
    all_started = threading.Barrier(len(reports))

    def rank(number: int) -> None:
        connection = TCPStore(
            "127.0.0.1",
            store.port,
            None,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE * 60),
        )
        world = replace(World(rank=number, world_size=world_size), store=PrefixStore("0", connection))
        all_started.wait()
        since = time.monotonic()
        try:
            check_ranks(world, reports[number], timeout)
        except RendezvousError as error:
            answers[number] = str(error)
        times[number] = time.monotonic() - since

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"rank check of {len(reports)} ranks: {max(times):.2f} s")
    return answers


def test_all_there_and_alike(store: TCPStore) -> None:
    assert called(store, [SAME] * 4, 4) == [""] * 4


def test_who_is_missing_is_named_on_all_ranks(store: TCPStore) -> None:
    since = time.monotonic()
    answers = called(store, [SAME, SAME, {**SAME, "host": "n2"}], 8, timeout=3)
    assert time.monotonic() - since < PATIENCE * 3
    assert len(set(answers)) == 1
    assert answers[0].startswith("expected 8 ranks, after 3 s saw 0-1 from n1, 2 from n2; missing: rank 3-7.")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("torch", "torch must"),
        ("configuration", "the configuration"),
        ("code", "the code in launch/"),
        ("world_size", "the world size must"),
    ],
)
def test_who_differs_is_named(store: TCPStore, key: str, message: str) -> None:
    other = {**SAME, "host": "n2", key: "other"}
    answers = called(store, [SAME, SAME, other, SAME], 4)
    assert answers[1].startswith(message)
    assert answers[1].endswith(
        f"be the same on all ranks: {SAME[key]} on rank 0-1, 3 (n1); other on rank 2 (n2)"
    )


def test_a_gpu_that_two_ranks_claim_is_named() -> None:
    reports = [
        {**SAME, "gpu": "GPU-a"},
        {**SAME, "gpu": "GPU-b"},
        {**SAME, "gpu": "GPU-a"},
        {**SAME, "gpu": "GPU-a", "host": "n2"},
    ]
    assert differing_ranks(reports).startswith(
        "ranks 0, 2 on n1 have the same GPU (GPU-a): start one rank a GPU"
    )
    assert not differing_ranks([*reports[:2], reports[3]])


def test_spans() -> None:
    assert spans([3, 0, 1, 2, 7, 9, 8]) == "0-3, 7-9"
    assert spans([5]) == "5"


@pytest.mark.slow
def test_512_ranks_meet_in_seconds(store: TCPStore) -> None:
    assert (
        called(store, [{**SAME, "host": f"n{rank // 8}"} for rank in range(512)], 512, timeout=PATIENCE * 30)
        == [""] * 512
    )


# real processes ---------------------------------------------------------------------------------------------


def alone(cwd: Path, rank: int, *args: str, port: int) -> CommandResult:
    """One rank of two, the other of which never comes."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return wait_for_command(
        start_command(
            f"recipe={TINY}:Fit", "steps=1", "start_timeout=2", *args, cwd=cwd, env={**place, **meet}
        )
    )


def test_a_rank_without_the_others_says_so_and_ends(tmp_path: Path) -> None:
    ended = alone(tmp_path, 0, port=free_port())
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("rankzero: expected 2 ranks, after 2 s saw 0 from ")
    assert ended.stderr.count("\n") == 1
    assert str(ROOT) not in ended.stderr


@pytest.mark.slow
def test_a_rank_that_cannot_reach_rank_zero_says_so_and_ends(tmp_path: Path) -> None:
    port = free_port()
    ended = alone(tmp_path, 1, port=port)
    assert ended.returncode == 1
    assert f"rank 1 did not meet the others: at 127.0.0.1:{port} (127.0.0.1) nobody listens" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        ended = alone(tmp_path, 0, port=port)
    assert ended.returncode == 1
    assert f"rank 0 did not meet the others: port {port} cannot be had on" in ended.stderr
