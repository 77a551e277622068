"""How the ranks of a run meet: a store for notes, a roll-call before the first collective, then the process
group.

A start that cannot succeed ends after `start_timeout` seconds with the names of who is missing or who
differs. Without the roll-call the ranks that are there would wait in their first collective for those that
are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # its stubs forget them

from launch.runtime.restarts import attempt_id
from launch.runtime.store import (
    UnreachableError,
    check_own,
    open_store,
    reach,
    rendezvous_endpoint,
    spans,
    wait_for,
)
from launch.runtime.versions import code_digest, versions
from launch.runtime.world import World, find_device

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""of a single collective: long after the watch has found the hang, and said more about it"""
REFUSED = {
    "torch": "torch",
    "rankzero": "rankzero",
    "deepspeed": "deepspeed",
    "python": "Python",
    "code": "the code in launch/, strategies/ and recipes/",
    "words": "the configuration (the words after run.py, the file that config= names, the recipe's own file)",
    "world_size": "the world size",
}
"""what must be the same on all ranks"""


class RendezvousError(Exception):
    """The ranks of a run could not come together; the message says who is missing, or who differs."""

    known_to_all = False
    """whether rank zero knows of it too, and tells it"""


class RollCallError(RendezvousError):
    """What rank zero has found."""

    known_to_all = True


@contextmanager
def process_group(
    world: World, strategy: str = "ddp", start_timeout: float = 60.0, identity: str = ""
) -> Iterator[World]:
    """The world with its device and store and, unless `strategy` is single, a process group for as long as
    the context lasts. After an exception the group is left as it is: the failure is reported first, and ends
    the process.

    `identity` is what this rank was asked to do, as text that must be the same on all. Raises ValueError if a
    node has fewer GPUs than ranks, NotAllThere if the ranks do not come together.
    """
    world = replace(world, device=find_device(world))
    cuda = world.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(world.device)
        os.environ.setdefault(
            "TORCH_FR_BUFFER_SIZE", "2000"
        )  # NCCL's flight recorder, for the verdict on a hang
    if world.world_size == 1:
        world = replace(world, store=HashStore())
    else:
        world = replace(world, store=meet(world, start_timeout))
        roll_call(world, report(world, identity), start_timeout)
    if strategy == "single":
        yield world
        return
    # FSDP and DeepSpeed want a group even for one rank, which meets itself in memory
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("group", world.store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch.device(world.device) if cuda else None,
    )
    yield world
    # not after an exception: with NCCL this waits for the other ranks, which wait for this one in a collective
    dist.destroy_process_group()


def meet(world: World, timeout: float, again: bool = False) -> Store:
    """A connection to the store that all ranks share. Rank zero makes it, if the launcher has not and it is
    not a second one.

    Raises NotAllThere if it cannot be reached within `timeout` seconds.
    """
    point = rendezvous_endpoint(world, os.environ)
    assert point is not None
    serves = not again and world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if serves:
            check_own(*point)
        else:
            reach(*point, timeout)
        # neither a restarted run nor one that a host has joined must find the notes of its former life
        return open_store(point, f"rankzero/{attempt_id(os.environ)}-{world.world_size}", serves, timeout)
    except UnreachableError as error:
        raise RendezvousError(f"rank {world.rank} did not meet the others: {error}") from None


# the roll-call ----------------------------------------------------------------------------------------------


def report(world: World, identity: str) -> dict[str, Any]:
    """What rank zero wants to know of this rank."""
    found = versions()
    return {
        "host": socket.gethostname(),
        "gpu": gpu_of(world),
        "world_size": world.world_size,
        "python": found["python"].rpartition(".")[0],
        **{name: found.get(name, "none") for name in ("torch", "rankzero", "deepspeed")},
        "code": code_digest(),
        "words": hashlib.sha256(identity.encode()).hexdigest()[:12],
    }


def gpu_of(world: World) -> str:
    """The GPU of this rank by its own number, which does not depend on what is visible; empty on a CPU."""
    if not world.device.startswith("cuda"):
        return ""
    return str(torch.cuda.get_device_properties(world.device).uuid)


def roll_call(world: World, mine: Mapping[str, Any], timeout: float) -> None:
    """Report, and wait for rank zero's word that all are there and alike. Raises NotAllThere on all ranks if
    they are not.
    """
    store = world.store
    store.set(f"beat/{world.rank}", "0 0 0 start")
    store.set(f"here/{world.rank}", json.dumps(mine))
    if world.rank == 0:
        store.set("roll-call", judge(store, world.world_size, timeout) or "complete")
    # rank zero waits as long as this rank, from its own start: it may be later
    if not wait_for(lambda: store.check(["roll-call"]), timeout + 10):
        raise RendezvousError(
            f"rank {world.rank} on {socket.gethostname()} heard nothing of rank zero for {timeout + 10:g} s"
        )
    answer = store.get("roll-call").decode()
    if answer != "complete":
        raise RollCallError(answer)


def judge(store: Store, world_size: int, timeout: float) -> str:
    """In words, what keeps the run from starting; empty if nothing does. On rank zero."""
    keys = [f"here/{rank}" for rank in range(world_size)]
    if not wait_for(lambda: store.check(keys), timeout):
        there = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
        return absent(there, world_size, timeout)
    reports = [json.loads(answer) for answer in store.multi_get(keys)]
    return different(reports)


def absent(there: Mapping[int, Mapping[str, Any]], world_size: int, timeout: float) -> str:
    """Who is missing."""
    missing = [rank for rank in range(world_size) if rank not in there]
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, report in there.items():
        hosts[report["host"]].append(rank)
    seen = ", ".join(f"{spans(ranks)} from {host}" for host, ranks in hosts.items())
    return (
        f"expected {world_size} ranks, after {timeout:g} s saw {seen}; missing: rank {spans(missing)}. Did their processes "
        "start, and do they reach this host? (start_timeout= gives them longer; launch/commands/doctor.py tells more)"
    )


def different(reports: list[dict[str, Any]]) -> str:
    """Who is not like the others."""
    for key, words in REFUSED.items():
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, report in enumerate(reports):
            groups[str(report[key])].append(rank)
        if len(groups) > 1:
            told = "; ".join(
                f"{value} on rank {spans(ranks)} ({', '.join(sorted({reports[rank]['host'] for rank in ranks}))})"
                for value, ranks in groups.items()
            )
            return f"{words} must be the same on all ranks: {told}"
    claimed: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        if report["gpu"]:
            claimed[report["host"], report["gpu"]].append(rank)
    for (host, gpu), ranks in claimed.items():
        if len(ranks) > 1:
            return (
                f"ranks {spans(ranks)} on {host} have the same GPU ({gpu}): start one rank a GPU, and let each see its own "
                "(torchrun --nproc_per_node=GPUS, or srun --ntasks-per-node=GPUS --gpus-per-node=GPUS)"
            )
    return ""
