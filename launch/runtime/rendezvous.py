"""The rendezvous: the ranks of a run meet at a store, check each other, and make the process group.

A start that cannot succeed ends after `start_timeout` seconds with the names of the ranks that are missing or
that differ: before the first collective, in which the others would wait for those that are missing.

Keys of the store: heartbeat/RANK, rank_info/RANK, and rank_check, which rank zero sets for all.
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
    check_own_endpoint,
    open_store,
    rendezvous_endpoint,
    spans,
    wait_for,
    wait_until_open,
)
from launch.runtime.versions import code_digest, versions
from launch.runtime.world import World, find_device

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""of a single collective: long after the watchdog has reported the hang, with more detail"""
RANK_CHECK, COMPLETE = "rank_check", "complete"
FIRST_HEARTBEAT = "0 0 0 start"
"""before the watchdog beats: a rank that is not connected yet is not lost"""
MUST_AGREE = {
    "torch": "torch",
    "rankzero": "rankzero",
    "deepspeed": "deepspeed",
    "python": "Python",
    "code": "the code in launch/, strategies/ and recipes/",
    "configuration": "the configuration (the arguments, the file that config= names, the recipe's own file)",
    "world_size": "the world size",
}
"""entries of a rank's info that must be the same on all ranks, as messages name them"""


class RendezvousError(Exception):
    """The ranks of a run could not come together; the message says who is missing, or who differs."""

    known_to_all = False
    """whether rank zero knows of it too, and prints it"""


class RankCheckError(RendezvousError):
    """Rank zero has found ranks that are missing or differ."""

    known_to_all = True


@contextmanager
def process_group(
    world: World, strategy: str = "ddp", start_timeout: float = 60.0, identity: str = ""
) -> Iterator[World]:
    """The world with its device and store and, unless `strategy` is single, a process group for as long as
    the context lasts. After an exception the group is left as it is: the failure is reported first, and ends
    the process.

    `identity` is what this rank was asked to do, as text that must be the same on all. Collective. Raises
    ValueError if a node has fewer GPUs than ranks, RendezvousError if the ranks do not come together.
    """
    world = replace(world, device=find_device(world))
    cuda = world.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(world.device)
        # NCCL's flight recorder, for the report on a hang
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if world.world_size == 1:
        world = replace(world, store=HashStore())
    else:
        world = replace(world, store=meet(world, start_timeout))
        check_ranks(world, rank_info(world, identity), start_timeout)
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
    # not after an exception: with NCCL this waits for the other ranks, which may wait for this one in a
    # collective
    dist.destroy_process_group()


def heartbeat_key(rank: int) -> str:
    """Where in the store a rank writes its heartbeats (`launch.watchdog`)."""
    return f"heartbeat/{rank}"


def rank_info_key(rank: int) -> str:
    """Where in the store a rank says what it is: host, GPU, versions."""
    return f"rank_info/{rank}"


def meet(world: World, timeout: float, again: bool = False) -> Store:
    """A connection to the store that all ranks share. Rank zero serves it, unless the launcher does or this
    is
    a second connection (`again`).

    Raises RendezvousError if it cannot be reached within `timeout` seconds.
    """
    endpoint = rendezvous_endpoint(world, os.environ)
    assert endpoint is not None
    serves = not again and world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if serves:
            check_own_endpoint(*endpoint)
        else:
            wait_until_open(*endpoint, timeout)
        # neither a restarted run nor one that a host has joined may find the entries of the attempt before
        return open_store(endpoint, f"rankzero/{attempt_id(os.environ)}-{world.world_size}", serves, timeout)
    except UnreachableError as error:
        raise RendezvousError(f"rank {world.rank} did not meet the others: {error}") from None


# the check of all ranks -------------------------------------------------------------------------------------


def rank_info(world: World, identity: str) -> dict[str, Any]:
    """What rank zero checks of this rank."""
    installed = versions()
    return {
        "host": socket.gethostname(),
        "gpu": gpu_of(world),
        "world_size": world.world_size,
        "python": installed["python"].rpartition(".")[0],
        **{name: installed.get(name, "none") for name in ("torch", "rankzero", "deepspeed")},
        "code": code_digest(),
        "configuration": hashlib.sha256(identity.encode()).hexdigest()[:12],
    }


def gpu_of(world: World) -> str:
    """The UUID of this rank's GPU, which does not depend on what is visible; empty on a CPU."""
    if not world.device.startswith("cuda"):
        return ""
    return str(torch.cuda.get_device_properties(world.device).uuid)


def check_ranks(world: World, info: Mapping[str, Any], timeout: float) -> None:
    """Publish this rank's info, and wait until rank zero has found all ranks present and alike. Collective.

    Raises RendezvousError on all ranks if they are not.
    """
    store = world.store
    store.set(heartbeat_key(world.rank), FIRST_HEARTBEAT)
    store.set(rank_info_key(world.rank), json.dumps(info))
    if world.rank == 0:
        store.set(RANK_CHECK, find_problem(store, world.world_size, timeout) or COMPLETE)
    # rank zero waits as long as this rank, from its own start: it may be later
    if not wait_for(lambda: store.check([RANK_CHECK]), timeout + 10):
        raise RendezvousError(
            f"rank {world.rank} on {socket.gethostname()} got no answer of rank zero within {timeout + 10:g} "
            "s"
        )
    answer = store.get(RANK_CHECK).decode()
    if answer != COMPLETE:
        raise RankCheckError(answer)


def find_problem(store: Store, world_size: int, timeout: float) -> str:
    """On rank zero: a message on what keeps the run from starting; empty if nothing does."""
    keys = [rank_info_key(rank) for rank in range(world_size)]
    if not wait_for(lambda: store.check(keys), timeout):
        present = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
        return missing_ranks(present, world_size, timeout)
    return differing_ranks([json.loads(info) for info in store.multi_get(keys)])


def missing_ranks(present: Mapping[int, Mapping[str, Any]], world_size: int, timeout: float) -> str:
    """The message on ranks that have not come; `present` are the infos of those that have."""
    missing = [rank for rank in range(world_size) if rank not in present]
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, info in present.items():
        hosts[info["host"]].append(rank)
    seen = ", ".join(f"{spans(ranks)} from {host}" for host, ranks in hosts.items())
    return (
        f"expected {world_size} ranks, after {timeout:g} s saw {seen}; missing: rank {spans(missing)}. Did "
        "their "
        "processes start, and do they reach this host? (start_timeout= gives them longer; `rankzero doctor` "
        "tells "
        "more)"
    )


def differing_ranks(infos: list[dict[str, Any]]) -> str:
    """The message on ranks that are not like the others, or share a GPU; empty if there are none."""
    for key, name in MUST_AGREE.items():
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, info in enumerate(infos):
            groups[str(info[key])].append(rank)
        if len(groups) > 1:
            values = "; ".join(
                f"{value} on rank {spans(ranks)} "
                f"({', '.join(sorted({infos[rank]['host'] for rank in ranks}))})"
                for value, ranks in groups.items()
            )
            return f"{name} must be the same on all ranks: {values}"
    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, info in enumerate(infos):
        if info["gpu"]:
            users[info["host"], info["gpu"]].append(rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            return (
                f"ranks {spans(ranks)} on {host} have the same GPU ({gpu}): start one rank a GPU, and let "
                "each see "
                "its own (torchrun --nproc_per_node=GPUS, or srun --ntasks-per-node=GPUS "
                "--gpus-per-node=GPUS)"
            )
    return ""
