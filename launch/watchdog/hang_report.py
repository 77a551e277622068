"""The failure reports on what heartbeats show: ranks that are lost, a hang, a store that is out of reach."""

from __future__ import annotations

import json
import threading
import traceback
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it

from launch.runtime.rendezvous import rank_info_key
from launch.runtime.store import spans, wait_for
from launch.runtime.torch_private import frame_of_thread, nccl_flight_recorder
from launch.watchdog.exception_report import innermost_frame, origin
from launch.watchdog.failure_report import FailureReport
from launch.watchdog.heartbeats import Heartbeats

if TYPE_CHECKING:
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

STACKS_WANTED = "stacks_wanted"
NAMED = 8
"""lost ranks that are named one by one"""


def lost_ranks(
    ranks: Sequence[int], store: Store, heartbeats: Heartbeats, world: World, phase: Phase
) -> FailureReport:
    """The report on ranks that have ended without a failure report of their own."""
    seen = []
    for rank in ranks[:NAMED]:
        status = heartbeats.statuses[rank]
        host = host_of(store, rank)
        seen.append(f"rank {rank} on {host}, last seen in step {status.step}, {status.phase}")
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return FailureReport(
        kind="lost",
        **origin(world, phase),
        lost=list(ranks),
        message=f"{'; '.join(seen)}{more}: ended without a word; rank {world.rank} is in step {phase.step}, "
        f"{phase.name}. Killed (out of memory? `dmesg` of that host tells), or the host or its network is "
        "down",
    )


def disconnected(world: World, phase: Phase) -> FailureReport:
    """The report of a rank that cannot reach the store, and so none of the others."""
    return FailureReport(
        kind="lost",
        **origin(world, phase),
        message=f"rank {world.rank} lost the connection to the host of rank zero: it is down, or its "
        "launcher has ended",
    )


def hang(
    store: Store, world: World, phase: Phase, timeout: float, hang_timeout: float, patience: float
) -> FailureReport:
    """The report on a run without progress for `timeout` seconds: which ranks are in which call.

    All ranks that live within `patience` seconds write their stacks. Called by rank zero's watchdog.
    """
    keys = [stack_key(rank) for rank in range(world.world_size)]
    store.set(STACKS_WANTED, "")
    write_stack(store, world.rank, phase)
    wait_for(lambda: store.check(keys), patience)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    stacks: dict[str, str] = {}
    for rank, key in enumerate(keys):
        if store.check([key]):
            found = json.loads(store.get(key))
            groups[f"step {found['step']}, {found['phase']}", found["line"]].append(rank)
            stacks.setdefault(found["line"], found["stack"])
        else:
            where = f"not heard from on {host_of(store, rank)}: stuck outside Python, or gone"
            groups[where, ""].append(rank)
    # small groups are the cause, as a rule: the others wait for them
    order = sorted(groups.items(), key=lambda item: len(item[1]))
    place = "they are not in the same place" if len(groups) > 1 else "all are in the same place"
    return FailureReport(
        kind="hang",
        **origin(world, phase),
        message=f"no rank has made progress for {timeout:g} s (hang_timeout={hang_timeout:g}); {place}",
        ranks=[
            f"rank {spans(ranks)}: {where}{f', {line}' if line else ''}" for (where, line), ranks in order
        ],
        groups={where: ranks for (where, _), ranks in order},
        stacks=stacks,
        flight_recorder=(nccl_flight_recorder() or None) if world.device.startswith("cuda") else None,
    )


def stack_key(rank: int) -> str:
    """Where a rank writes its stack."""
    return f"stack/{rank}"


def write_stack(store: Store, rank: int, phase: Phase) -> None:
    """Write where this rank's main thread is: step, phase, the innermost line of the user's code or ours, and
    the whole stack.
    """
    frame = frame_of_thread(threading.main_thread().ident or 0)
    content = {
        "step": phase.step,
        "phase": phase.name,
        "line": innermost_frame(frame),
        "stack": "".join(traceback.format_stack(frame)),
    }
    store.set(stack_key(rank), json.dumps(content))


def host_of(store: Store, rank: int) -> str:
    """The host of a rank, as it has said at the rendezvous."""
    key = rank_info_key(rank)
    return str(json.loads(store.get(key))["host"]) if store.check([key]) else "?"
