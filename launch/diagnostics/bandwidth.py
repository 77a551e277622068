"""How fast neighbours exchange data, pair by pair, against what the link between them should give."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.diagnostics.exchange import Meeting
from launch.diagnostics.network import spoken
from launch.diagnostics.report import Finding, Report, Status, leaders_of, listed, nodes_of
from launch.runtime.store import open_store, within

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it, its stubs do not

Pair = tuple[int, int]
PAIR = {"gloo": 6.0, "nccl": 12.0}
"""seconds that a pair gets; NCCL takes some of them to look at the topology"""
BUDGET = 0.6
"""seconds of measuring, for each of the two collectives"""
SMALLEST, LARGEST = 2**20, {"gloo": 2**24, "nccl": 2**28}
ENOUGH = 0.5
"""part of the link, or of what the median pair has, below which it is told"""
GLOO_MOST = 10e3
"""Mb/s that gloo is asked for at most: one thread moves and adds the data, 1.2 GB/s within one machine of two
cores
"""


# which pairs ------------------------------------------------------------------------------------------------


def neighbours(reports: list[Report]) -> list[list[Pair]]:
    """Pairs of ranks in rounds: the ring of the nodes first, then the rings within them. No rank is twice in
    a round.

    A ring needs two or three rounds, however long it is: a thousand nodes take no longer than three. Not all
    pairs are measured.
    """
    between = rounds(ring([report.rank for report in leaders_of(reports).values()]))
    inside = rounds(
        [pair for mine in nodes_of(reports).values() for pair in ring([report.rank for report in mine])]
    )
    return between + inside


def ring(ranks: Sequence[int]) -> list[Pair]:
    """Each with the next, the last with the first."""
    pairs = list(zip(ranks, [*ranks[1:], *ranks[:1]], strict=True))
    return [] if len(ranks) < 2 else pairs[:1] if len(ranks) == 2 else pairs


def rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs, shared out so that those of one round have no rank in common."""
    made: list[list[Pair]] = []
    for pair in pairs:
        place = next(
            (chosen for chosen in made if not any(rank in pair for other in chosen for rank in other)), None
        )
        if place is None:
            made.append(place := [])
        place.append(pair)
    return made


# measuring --------------------------------------------------------------------------------------------------


def measure(
    meeting: Meeting, point: tuple[str, int], token: str, plan: Sequence[Sequence[Pair]], device: str
) -> list[dict[str, Any]]:
    """What this rank measured as the first of a pair; a pair that fails says so, within its time, and stops
    no other.
    """
    backend = "nccl" if device.startswith("cuda") else "gloo"
    results = []
    for turn, pairs in enumerate(plan):
        for pair in pairs:
            if meeting.rank in pair:
                result = one_pair(
                    meeting, point, f"{token}/{turn}/{pair[0]}-{pair[1]}", pair, device, backend
                )
                results += [{"pair": pair, **result}] if meeting.rank == pair[0] else []
        meeting.wait_for(f"turn/{turn}", meeting.ranks, PAIR[backend] + 2)
    return results


def one_pair(
    meeting: Meeting, point: tuple[str, int], name: str, pair: Pair, device: str, backend: str
) -> dict[str, Any]:
    """Bytes a second of both collectives, or a problem."""
    if any(meeting.store.check([f"stuck/{rank}"]) for rank in pair):
        return {"problem": "not measured: one of the two hangs since the pair before"}
    problems: list[str] = []
    try:
        return within(
            PAIR[backend] + 1,
            lambda: exchange(open_store(point, name), pair.index(meeting.rank), device, backend, problems),
        )
    except (
        TimeoutError
    ) as error:  # its group is still in the hands of the thread that hangs: no other can be made here
        meeting.put(f"stuck/{meeting.rank}", True)
        return {"problem": problems[0] if problems else str(error)}
    except Exception as error:
        return {"problem": " ".join(str(error).split())[:160]}


def exchange(store: Store, rank: int, device: str, backend: str, problems: list[str]) -> dict[str, float]:
    """All-reduce and all-gather between two ranks, in bytes a second in one direction of the link.

    Each sends as many bytes as it has, S (n - 1) / n twice for all-reduce and S (n - 1) for all-gather with n
    = 2, so both figures compare with the speed of the link.
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md

    An exception is noted in `problems` at once: with NCCL, leaving the group may then wait for the other rank.
    """
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(device)
    groups = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"  # as in a run
    dist.init_process_group(
        groups, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=PAIR[backend] - 2)
    )
    try:

        def reduce(size: int) -> Callable[[], object]:
            tensor = torch.zeros(size // 4, device=device)
            return lambda: dist.all_reduce(tensor)

        def gather(size: int) -> Callable[[], object]:
            tensor = torch.zeros(size // 4, device=device)
            whole = torch.zeros(size // 4 * 2, device=device)
            # the second is what torch calls it before 2.14, and deprecates from then on
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return lambda: all_gather(whole, tensor)

        return {"all_reduce": speed(reduce, device, backend), "all_gather": speed(gather, device, backend)}
    except Exception as error:
        problems.append(" ".join(str(error).split())[:160])
        raise
    finally:
        dist.destroy_process_group()


def speed(make: Callable[[int], Callable[[], object]], device: str, backend: str) -> float:
    """Bytes a second of a collective, of a size and as often as BUDGET allows; both ranks choose the same."""
    import torch
    import torch.distributed as dist

    def seconds(size: int, times: int) -> float:
        call = make(size)
        call()
        ready(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        ready(device)
        took = torch.tensor((time.perf_counter() - start) / times, dtype=torch.float64, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took)

    small = seconds(SMALLEST, 2)
    size = min(max(int(SMALLEST * BUDGET / 6 / small) // SMALLEST, 1) * SMALLEST, LARGEST[backend])
    times = min(max(int(BUDGET * SMALLEST / small / size), 1), 50)
    return size / seconds(size, times)


def ready(device: str) -> None:
    """Wait for the GPU; the CPU's collectives have ended when they return."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# judging ----------------------------------------------------------------------------------------------------


def judge(results: Sequence[Mapping[str, Any]], reports: list[Report]) -> list[Finding]:
    """The pairs between nodes against the links, those within a node for information."""
    node_of = {report.rank: node for node, mine in nodes_of(reports).items() for report in mine}
    between = [result for result in results if node_of[result["pair"][0]] != node_of[result["pair"][1]]]
    inside = [result for result in results if node_of[result["pair"][0]] == node_of[result["pair"][1]]]
    return judge_between(between, reports, node_of) + judge_inside(inside, node_of)


def judge_between(
    results: Sequence[Mapping[str, Any]], reports: list[Report], node_of: Mapping[int, str]
) -> list[Finding]:
    """Each pair of nodes against its link and, where the link does not tell its speed, against the median
    pair.
    """
    if not results:
        return []
    leaders = leaders_of(reports)
    rates = sorted(
        max(result["all_reduce"], result["all_gather"]) for result in results if "problem" not in result
    )
    groups: dict[tuple[Status, str], list[Mapping[str, Any]]] = {}
    for result in results:
        first, second = (leaders[node_of[rank]] for rank in result["pair"])
        megabits = link(first, second)
        if "problem" in result:
            groups.setdefault(("fail", result["problem"]), []).append(result)
            continue
        # a slow link slows both; gloo's all-gather is slow by itself, a third of its all-reduce where the
        # memory is the limit
        rate = max(result["all_reduce"], result["all_gather"])
        slow = (
            rate < ENOUGH * min(megabits or rate * 8e-6, most(first)) * 1e6 / 8
            or rate < ENOUGH * rates[len(rates) // 2]
        )
        words = (
            f"the link has {spoken(megabits)}, that is {megabits / 8000:.3g} GB/s"
            if megabits
            else "the link does not tell its speed"
        )
        groups.setdefault(("warn" if slow else "pass", words), []).append(result)
    fixes = {
        "pass": "",
        "warn": "at both ends: `ethtool DEV | grep Speed`, errors in `ip -s link`, other jobs; NCCL_DEBUG=INFO names the path",
        "fail": "the nodes meet at the master's port, but not at others: see `names`; a firewall must let all ports through "
        "between the nodes",
    }
    return [
        finding("bandwidth", status, words, mine, node_of, fixes[status])
        for (status, words), mine in groups.items()
    ]


def judge_inside(results: Sequence[Mapping[str, Any]], node_of: Mapping[int, str]) -> list[Finding]:
    """Pairs within a node: figures only, there is nothing that says what NVLink, PCIe or memory should give."""
    groups: dict[tuple[Status, str], list[Mapping[str, Any]]] = {}
    for result in results:
        problem = result.get("problem", "")
        groups.setdefault(("fail" if problem else "pass", problem), []).append(result)
    fix = "the ranks of a node do not reach each other: see `names` and GPUs; try NCCL_P2P_DISABLE=1, or NCCL_DEBUG=INFO"
    return [
        finding("within a node", status, words, mine, node_of, fix if status == "fail" else "")
        for (status, words), mine in groups.items()
    ]


def finding(
    check: str,
    status: Status,
    words: str,
    results: Sequence[Mapping[str, Any]],
    node_of: Mapping[int, str],
    fix: str,
) -> Finding:
    """One row for pairs of which the same holds."""
    nodes = dict.fromkeys(node_of[rank] for result in results for rank in result["pair"])
    inside = check == "within a node"
    pairs = [
        " - ".join(f"rank {rank}" if inside else node_of[rank] for rank in result["pair"])
        for result in results
    ]
    figures = [
        f"{name} {span([result[key] for result in results])}"
        for key, name in (("all_reduce", "all-reduce"), ("all_gather", "all-gather"))
        if status != "fail"
    ]
    found = f"{listed(pairs, 'pairs')}: {', '.join(figures)}" + (
        f"{'; ' if figures else ''}{words}" if words else ""
    )
    return Finding(check=check, status=status, found=found, fix=fix, nodes=tuple(nodes))


def span(rates: Sequence[float]) -> str:
    """Rates in words: one, or from the least to the most."""
    least, most = min(rates) / 1e9, max(rates) / 1e9
    return f"{least:.2g} GB/s" if f"{least:.2g}" == f"{most:.2g}" else f"{least:.2g} to {most:.2g} GB/s"


def link(first: Report, second: Report) -> int:
    """Mb/s of the slower end, as far as the ends tell; InfiniBand where NCCL would take it. 0 if neither
    tells.
    """
    ends = [report.facts["network"] for report in (first, second)]
    cuda = all(report.facts["gpu"]["device"].startswith("cuda") for report in (first, second))
    if cuda and all(end["infiniband"] for end in ends) and os.environ.get("NCCL_IB_DISABLE") != "1":
        return min(int(end["infiniband"]) for end in ends)
    return min((int(end["speed"]) for end in ends if end["speed"]), default=0)


def most(report: Report) -> float:
    """Mb/s that the backend is expected to fill."""
    return float("inf") if report.facts["gpu"]["device"].startswith("cuda") else GLOO_MOST
