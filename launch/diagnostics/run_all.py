"""The order of the checks: each rank by itself, the ranks together, and what rank zero concludes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from launch.diagnostics import (
    bandwidth,
    bandwidth_findings,
    cross_node,
    gpus,
    machine,
    network,
    software,
)
from launch.diagnostics.bandwidth import Pair, PairBandwidth
from launch.diagnostics.cross_node import ClockOffset, SharedStorageResult
from launch.diagnostics.exchange import Exchange
from launch.diagnostics.findings import Finding, run_check
from launch.diagnostics.rank_report import RankReport, empty_report, node_leaders, node_of_rank
from launch.runtime.world import World

T = TypeVar("T")
Endpoint = tuple[str, int]
CHECK_TIMEOUT_S = 10.0
"""for a check of one node; most need milliseconds"""
IMPORT_TIMEOUT_S = 120.0
"""for the import of torch: thousands of files, from a cold network disk"""
RESULTS_GRACE_S = 10.0
"""by which a rank may be later with its results than rank zero, which has waited for it on the way"""


def collect(check: str, timeout_s: float, function: Callable[[], T], findings: list[Finding]) -> T | None:
    """What `function` returns; None if it raises or hangs, with a finding about that added to `findings`."""
    results: list[T] = []

    def keep_result() -> list[Finding]:
        results.append(function())
        return []

    findings += run_check(check, timeout_s, keep_result)
    return results[0] if results else None


# each rank by itself ----------------------------------------------------------------------------------------


def run_local_checks(
    world: World, environment: Mapping[str, str], endpoint: Endpoint | None, run_dir: Path
) -> RankReport:
    """What this rank finds without the others. The first of a node also checks what its ranks share."""
    report = empty_report(world, environment)
    findings = report.findings
    report.software = collect(
        "versions", IMPORT_TIMEOUT_S, lambda: software.software_info(environment), findings
    )
    report.device = collect(
        "GPUs", 3 * CHECK_TIMEOUT_S, lambda: gpus.device_info(world, environment), findings
    )
    report.cpu = collect("CPUs", CHECK_TIMEOUT_S, lambda: machine.cpu_info(environment), findings)
    if world.local_rank > 0:
        return report
    master = endpoint[0] if endpoint else None
    report.network = collect(
        "network", 3 * CHECK_TIMEOUT_S, lambda: network.network_info(environment, master), findings
    )
    report.gpus = collect("GPUs", 2 * CHECK_TIMEOUT_S, gpus.list_gpus, findings)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "GPUs in use": lambda: gpus.check_gpus_in_use(
            report.gpus or [], environment.get("CUDA_VISIBLE_DEVICES")
        ),
        "shared memory": machine.check_shared_memory,
        "open files": machine.check_open_files,
        "locked memory": machine.check_locked_memory,
        "disk": lambda: machine.check_disk(run_dir),
        "extensions": lambda: check_extensions(report, environment),
        "port": lambda: check_endpoint(endpoint, world),
    }
    for check, function in checks.items():
        findings += run_check(check, CHECK_TIMEOUT_S, function)
    return report


def check_extensions(report: RankReport, environment: Mapping[str, str]) -> Iterable[Finding]:
    """The cache of compiled extensions, where torch could be imported."""
    if report.software is None:
        return []
    versions = report.software.versions
    cache = machine.extensions_cache(environment, versions.get("cuda"))
    return machine.check_extensions(cache, report.software.site_packages, versions["torch"])


def check_endpoint(endpoint: Endpoint | None, world: World) -> Iterable[Finding]:
    """The port at which the ranks meet; that of torchrun for a process by itself."""
    if endpoint is None:
        return network.check_port()
    if world.rank > 0:
        return []
    return [Finding(check="port", message=f"the ranks meet at {endpoint[0]}:{endpoint[1]}")]


# all together -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JointPlan:
    """What the ranks that joined check together; rank zero makes it."""

    ranks: list[int]
    leaders: list[int]
    """the first rank of each node"""
    rounds: list[list[Pair]]
    backend: str
    directory: str
    """an existing one, in which the run directory will lie"""
    token: str
    """part of names that no other doctor uses"""

    @property
    def timeout_s(self) -> float:
        """By then `run_joint_checks` has ended on all ranks, whatever hangs."""
        rounds_s = len(self.rounds) * (bandwidth.PAIR_TIMEOUT_S[self.backend] + 3)
        return (
            rounds_s
            + cross_node.CLOCKS_TIMEOUT_S
            + cross_node.VISIBLE_TIMEOUT_S
            + 3 * cross_node.BARRIER_TIMEOUT_S
        )


@dataclass(kw_only=True)
class JointResults:
    """What one rank found together with the others."""

    findings: list[Finding] = field(default_factory=list)
    """about checks that raised or hung"""
    clock: ClockOffset | None = None
    shared_storage: SharedStorageResult | None = None
    bandwidth: list[PairBandwidth] = field(default_factory=list)


def make_plan(reports: list[RankReport], run_dir: Path) -> JointPlan:
    """What the ranks of `reports` check together."""
    cuda = all(report.device is not None and report.device.is_cuda for report in reports)
    return JointPlan(
        ranks=[report.rank for report in reports],
        leaders=[leader.rank for leader in node_leaders(reports).values()],
        rounds=bandwidth.neighbor_rounds(reports),
        backend="nccl" if cuda else "gloo",
        directory=str(machine.nearest_existing(run_dir)),
        token=secrets.token_hex(4),
    )


def run_joint_checks(
    exchange: Exchange, plan: JointPlan, report: RankReport, endpoint: Endpoint
) -> JointResults:
    """What this rank finds together with the others. All ranks call it; each part ends by itself and cannot
    stop the next.
    """
    results = JointResults()
    leaders, directory = plan.leaders, Path(plan.directory)
    if len(leaders) > 1 and exchange.rank in leaders:
        results.clock = collect(
            "clock", plan.timeout_s, lambda: cross_node.measure_clock(exchange, leaders), results.findings
        )
        results.shared_storage = collect(
            "shared storage",
            plan.timeout_s,
            lambda: cross_node.probe_shared_storage(exchange, leaders, directory, plan.token),
            results.findings,
        )
    device = report.device.device if report.device and plan.backend == "nccl" else "cpu"
    pairs = collect(
        "bandwidth",
        plan.timeout_s,
        lambda: bandwidth.measure_pairs(exchange, endpoint, plan.token, plan.rounds, device),
        results.findings,
    )
    results.bandwidth = pairs or []
    return results


# what rank zero concludes -----------------------------------------------------------------------------------


def all_findings(
    reports: list[RankReport],
    results: Mapping[int, JointResults],
    world: World,
    environment: Mapping[str, str],
    directory: str,
) -> list[Finding]:
    """All findings, of one node or several; `results` are by rank."""
    leaders, nodes = node_leaders(reports), node_of_rank(reports)
    multi_node = len(leaders) > 1 or world.world_size > world.local_world_size
    findings = [cross_node.ranks_finding(reports, world, environment)] if world.launcher != "python" else []
    for report in reports:
        joint = results[report.rank].findings if report.rank in results else []
        findings += [replace(finding, nodes=(nodes[report.rank],)) for finding in report.findings + joint]
    findings += network.hostname_findings(reports, multi_node)
    findings += network.link_findings(reports, multi_node)
    findings += software.version_findings(reports)
    findings += software.environment_findings(reports)
    findings += gpus.gpu_findings(reports)
    findings += machine.cpu_findings(reports, world.local_world_size)
    return findings + joint_findings(reports, results, directory)


def joint_findings(
    reports: list[RankReport], results: Mapping[int, JointResults], directory: str
) -> list[Finding]:
    """What follows from the joint checks; none if there were none."""
    leaders, nodes = node_leaders(reports), node_of_rank(reports)
    lost = [report.rank for report in reports if results and report.rank not in results]
    findings = [lost_finding([nodes[rank] for rank in sorted(lost)])] if lost else []
    by_node = {node: results[leader.rank] for node, leader in leaders.items() if leader.rank in results}
    clocks = {node: result.clock for node, result in by_node.items() if result.clock}
    storage = {node: result.shared_storage for node, result in by_node.items() if result.shared_storage}
    findings += cross_node.clock_findings(clocks, next(iter(leaders)))
    findings += cross_node.shared_storage_findings(storage, nodes, directory)
    pairs = [
        pair for result in results.values() for pair in result.bandwidth if not set(lost) & set(pair.pair)
    ]
    return findings + bandwidth_findings.bandwidth_findings(pairs, reports)


def lost_finding(lost_nodes: list[str]) -> Finding:
    """The finding for ranks that joined and then sent no results."""
    names = tuple(dict.fromkeys(lost_nodes))
    return Finding(
        check="ranks",
        status="fail",
        message=f"no results from {', '.join(names)} since the ranks joined",
        fix="its own lines on the screen may say more; the node is overloaded, or the network drops it",
        nodes=names,
    )
