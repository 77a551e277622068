"""Several nodes: which ranks joined, whether the clocks agree, whether all nodes see the same directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.diagnostics.exchange import Exchange
from launch.diagnostics.findings import Finding, Outcome, first_names, merge_equal
from launch.diagnostics.machine import file_system
from launch.diagnostics.rank_report import RankReport, group_by_node
from launch.diagnostics.temp_files import removed_afterwards
from launch.runtime.slurm_env import step_hosts
from launch.runtime.store import addresses_of, spans
from launch.runtime.world import World

PINGS = 5
CLOCKS_TIMEOUT_S = 20.0
"""for all clocks together; a question and its answer take about a millisecond"""
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
"""above the second, SLURM's munge and Kerberos soon refuse credentials"""
VISIBLE_TIMEOUT_S = 5.0
"""in which a new file must be seen by all nodes; it has a new name, which no cache can hold as absent"""
BARRIER_TIMEOUT_S = 5.0
"""by which a node may come later than the others to a step of the check"""


# ranks ------------------------------------------------------------------------------------------------------


def ranks_finding(reports: list[RankReport], world: World, environment: Mapping[str, str]) -> Finding:
    """Whether all ranks joined, and on which nodes those are missing that did not."""
    groups = group_by_node(reports)
    if len(reports) == world.world_size:
        message = f"{len(reports)} of {world.world_size} joined"
        return Finding(check="ranks", message=message, nodes=tuple(groups))
    hosts = step_hosts(environment)
    if len(hosts) * world.local_world_size != world.world_size:
        hosts = []
    joined = [f"{spans([member.rank for member in members])} from {node}" for node, members in groups.items()]
    absent = [host for host in hosts if host not in groups]
    missing = sorted(set(range(world.world_size)) - {report.rank for report in reports})
    on = f" on {first_names(hosts)}" if hosts else ""
    rest = f"none from {first_names(absent)}" if absent else f"not {spans(missing)}"
    fix = (
        "their own lines on the screen say why they did not join; without any, the launcher did not "
        "start them, or they need longer than timeout="
    )
    if unresolved := [host for host in absent if not addresses_of(host)]:
        fix = f"{first_names(unresolved)} cannot be resolved from here (DNS, /etc/hosts); else {fix}"
    return Finding(
        check="ranks",
        status="fail",
        message=f"expected {world.world_size} ranks{on}; saw {', '.join(joined)}, {rest}",
        fix=fix,
        nodes=tuple(groups),
    )


# clocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """How far the clock of a node is ahead of rank zero's."""

    ahead_s: float
    error_s: float
    """at most this much of it is an error of the measurement"""


def measure_clock(exchange: Exchange, leaders: list[int]) -> ClockOffset | None:
    """The offset of this node's clock; None on rank zero, which answers the others. All `leaders` call it.

    Cristian's algorithm: rank zero's time was read between question and answer, so half the round trip bounds
    the error. The quickest of a few round trips counts. https://doi.org/10.1007/BF01784024
    """
    if exchange.rank == 0:
        answer_pings(exchange, leaders[1:])
        return None
    offsets = []
    for ping in range(PINGS):
        start = time.time()
        exchange.put(f"ping/{exchange.rank}/{ping}", True)
        master_time = exchange.get(f"pong/{exchange.rank}/{ping}", float, CLOCKS_TIMEOUT_S)
        end = time.time()
        offsets.append(ClockOffset(ahead_s=(start + end) / 2 - master_time, error_s=(end - start) / 2))
    return min(offsets, key=lambda offset: offset.error_s)


def answer_pings(exchange: Exchange, leaders: list[int]) -> None:
    """Rank zero's part of the measurement, one node after the other."""
    deadline = time.monotonic() + CLOCKS_TIMEOUT_S
    for leader in leaders:
        with contextlib.suppress(TimeoutError):  # a node that does not ask fails elsewhere
            for ping in range(PINGS):
                timeout_s = min(BARRIER_TIMEOUT_S, deadline - time.monotonic())
                exchange.get(f"ping/{leader}/{ping}", bool, timeout_s)
                exchange.put(f"pong/{leader}/{ping}", time.time())


def clock_findings(offsets: Mapping[str, ClockOffset], first_node: str) -> list[Finding]:
    """The clocks against that of `first_node`; `offsets` are by node."""
    outcomes: dict[str, Outcome] = {}
    good: dict[str, ClockOffset] = {}
    for node, offset in offsets.items():
        ahead_s, error_ms = abs(offset.ahead_s), offset.error_s * 1000
        if ahead_s - offset.error_s <= SKEW_WARN_S:
            good[node] = offset
            continue
        direction = "ahead of" if offset.ahead_s > 0 else "behind"
        outcomes[node] = Outcome(
            "fail" if ahead_s - offset.error_s > SKEW_FAIL_S else "warn",
            f"{ahead_s:.1f} s {direction} {first_node} (± {error_ms:.1f} ms)",
            "`timedatectl`: let chrony or ntpd set it; files seem to come from the future, and "
            "credentials expire early",
        )
    findings = merge_equal("clock", outcomes)
    if not good:
        return findings
    ahead_ms = max(abs(offset.ahead_s) for offset in good.values()) * 1000
    error_ms = max(offset.error_s for offset in good.values()) * 1000
    message = f"at most {ahead_ms:.1f} ms from {first_node} (± {error_ms:.1f} ms)"
    return [Finding(check="clock", message=message, nodes=tuple(good)), *findings]


# one directory for all nodes --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SharedStorageResult:
    """What a node saw of the files that the others wrote."""

    missing_ranks: list[int]
    """ranks of the nodes whose file it did not see"""
    error: str = ""
    """why it could not write its own"""
    seconds: float
    """until it saw all, or gave up"""


def probe_shared_storage(
    exchange: Exchange, leaders: list[int], directory: Path, token: str
) -> SharedStorageResult:
    """Write a file and rename it, then look for those of the other nodes. All `leaders` call it; the files
    are removed in any case.
    """

    def file_of(rank: int) -> Path:
        return directory / f".doctor-{token}-{rank}.complete"

    own = file_of(exchange.rank)
    partial = own.with_suffix(".partial")
    # rank zero removes those of all: a rank that was killed cannot
    others = [file_of(rank) for rank in leaders if rank != 0] if exchange.rank == 0 else []
    error = ""
    with removed_afterwards(partial, own, *others):
        try:
            partial.write_text(str(exchange.rank))
            partial.rename(own)
        except OSError as os_error:
            error = os_error.strerror or str(os_error)
        exchange.barrier("written", leaders, BARRIER_TIMEOUT_S)
        start = time.monotonic()
        missing = [rank for rank in leaders if rank != exchange.rank]
        while missing and time.monotonic() - start < VISIBLE_TIMEOUT_S:
            missing = [rank for rank in missing if not contains(file_of(rank), str(rank))]
            time.sleep(0.02 if missing else 0)
        seconds = time.monotonic() - start
        exchange.barrier("seen", leaders, VISIBLE_TIMEOUT_S + 1)
    return SharedStorageResult(missing_ranks=missing, error=error, seconds=seconds)


def contains(path: Path, text: str) -> bool:
    """Whether the file exists with this content."""
    with contextlib.suppress(OSError):
        return path.read_text() == text
    return False


def shared_storage_findings(
    results: Mapping[str, SharedStorageResult], nodes: Mapping[int, str], directory: str
) -> list[Finding]:
    """Whether all nodes see the same directory; `results` are by node, `nodes` by rank."""
    fix = (
        "checkpoints need one directory for all nodes: run_dir= on a file system that they share (NFS, "
        "Lustre), mounted at the same path"
    )
    slowest = max((result.seconds for result in results.values()), default=0.0)
    outcomes: dict[str, Outcome] = {}
    for node, result in results.items():
        if result.error:
            outcomes[node] = Outcome("fail", f"{directory}: {result.error}", fix)
        elif result.missing_ranks:
            others = first_names([nodes[rank] for rank in result.missing_ranks])
            outcomes[node] = Outcome("fail", f"{directory}: does not see what {others} wrote there", fix)
        else:
            kind, seconds = file_system(Path(directory)), max(slowest, 0.01)
            outcomes[node] = Outcome(
                "pass", f"{directory} ({kind}): new files are seen within {seconds:.2f} s"
            )
    return merge_equal("shared storage", outcomes)
