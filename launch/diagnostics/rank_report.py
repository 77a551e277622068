"""What one rank reports to rank zero, and reports grouped by node. Imports no torch."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launch.diagnostics.findings import Finding
from launch.diagnostics.system_info import GPU, CPUInfo, DeviceInfo, NetworkInfo, SoftwareInfo
from launch.runtime.world import World


@dataclass(kw_only=True)
class RankReport:
    """What one rank reports. An info is None where it could not be collected: then there is a finding about
    it.
    """

    rank: int = 0
    local_rank: int = 0
    host: str = ""
    node: int = 0
    """the number that the launcher gave to the node; 0 if it gives none"""
    software: SoftwareInfo | None = None
    device: DeviceInfo | None = None
    cpu: CPUInfo | None = None
    network: NetworkInfo | None = None
    """from the first rank of a node only"""
    gpus: list[GPU] | None = None
    """from the first rank of a node only"""
    findings: list[Finding] = field(default_factory=list)
    """of the checks that need no comparison with other ranks"""


def empty_report(world: World, environment: Mapping[str, str]) -> RankReport:
    """A report of this rank without any content.

    SLURM's name for a node is preferred to the host name: two of its nodes may be one machine, in a test.
    """
    host = environment.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    return RankReport(rank=world.rank, local_rank=world.local_rank, host=host, node=world.node)


def group_by_node(reports: Iterable[RankReport]) -> dict[str, list[RankReport]]:
    """The reports by node, in the order of ranks. Nodes with the same name (containers) get their number as
    well.
    """
    ordered = sorted(reports, key=lambda report: report.rank)
    nodes = dict.fromkeys((report.host, report.node) for report in ordered)
    nodes_with_name = Counter(host for host, _ in nodes)
    groups: dict[str, list[RankReport]] = {}
    for report in ordered:
        unique = nodes_with_name[report.host] == 1
        groups.setdefault(report.host if unique else f"{report.host}#{report.node}", []).append(report)
    return groups


def node_leaders(reports: Iterable[RankReport]) -> dict[str, RankReport]:
    """By node, the report of its first rank, which reports what all ranks of the node share."""
    return {node: members[0] for node, members in group_by_node(reports).items()}


def node_of_rank(reports: Iterable[RankReport]) -> dict[int, str]:
    """The node of each rank."""
    return {report.rank: node for node, members in group_by_node(reports).items() for report in members}
