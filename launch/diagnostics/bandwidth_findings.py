"""Measured bandwidth against what the link between the nodes should give. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from launch.diagnostics.bandwidth import PairBandwidth
from launch.diagnostics.findings import Finding, Status, first_names
from launch.diagnostics.network import format_link_speed
from launch.diagnostics.rank_report import RankReport, node_leaders, node_of_rank

MIN_FRACTION = 0.5
"""of the link, or of what the median pair has, below which it is a warning"""
GLOO_MAX_MBPS = 10e3
"""Mb/s that gloo is expected to fill at most: one thread moves and adds the data, 1.2 GB/s within one machine
of two cores
"""
INTER_NODE_FIXES: dict[Status, str] = {
    "pass": "",
    "warn": "at both ends: `ethtool DEV | grep Speed`, errors in `ip -s link`, other jobs; NCCL_DEBUG=INFO "
    "names the path",
    "fail": "the nodes reach each other at the master's port, but not at others: see `hostname`; a firewall "
    "must let all ports through between the nodes",
}
INTRA_NODE_FIXES: dict[Status, str] = {
    "pass": "",
    "fail": "the ranks of a node do not reach each other: see `hostname` and `GPUs`; try "
    "NCCL_P2P_DISABLE=1, or NCCL_DEBUG=INFO",
}
Groups = dict[tuple[Status, str], list[PairBandwidth]]
"""pairs by status and message"""


def bandwidth_findings(results: Sequence[PairBandwidth], reports: list[RankReport]) -> list[Finding]:
    """The pairs between nodes against their links; those within a node for information."""
    nodes = node_of_rank(reports)
    between = [result for result in results if nodes[result.pair[0]] != nodes[result.pair[1]]]
    inside = [result for result in results if nodes[result.pair[0]] == nodes[result.pair[1]]]
    findings = [
        make_finding("bandwidth", status, message, pairs, nodes, lambda rank: nodes[rank], INTER_NODE_FIXES)
        for (status, message), pairs in group_inter_node(between, reports, nodes).items()
    ]
    return findings + [
        make_finding(
            "intra-node", status, message, pairs, nodes, lambda rank: f"rank {rank}", INTRA_NODE_FIXES
        )
        for (status, message), pairs in group_intra_node(inside).items()
    ]


def group_inter_node(
    results: Sequence[PairBandwidth], reports: list[RankReport], nodes: Mapping[int, str]
) -> Groups:
    """Each pair of nodes against its link and, where the speed of the link is unknown, against the median
    pair.
    """
    groups: Groups = {}
    leaders = node_leaders(reports)
    rates = sorted(result.best for result in results if not result.error)
    for result in results:
        if result.error:
            groups.setdefault(("fail", result.error), []).append(result)
            continue
        first, second = (leaders[nodes[rank]] for rank in result.pair)
        link_mbps = slower_end_mbps(first, second)
        expected_mbps = min(link_mbps or result.best * 8e-6, max_mbps(first))
        slow = (
            result.best < MIN_FRACTION * expected_mbps * 1e6 / 8
            or result.best < MIN_FRACTION * rates[len(rates) // 2]
        )
        message = "the speed of the link is unknown"
        if link_mbps:
            message = f"the link has {format_link_speed(link_mbps)}, that is {link_mbps / 8000:.3g} GB/s"
        groups.setdefault(("warn" if slow else "pass", message), []).append(result)
    return groups


def group_intra_node(results: Sequence[PairBandwidth]) -> Groups:
    """Pairs within a node: figures only, nothing says what NVLink, PCIe or memory should give."""
    groups: Groups = {}
    for result in results:
        groups.setdefault(("fail" if result.error else "pass", result.error), []).append(result)
    return groups


def make_finding(
    check: str,
    status: Status,
    message: str,
    pairs: Sequence[PairBandwidth],
    nodes: Mapping[int, str],
    name_of: Callable[[int], str],
    fixes: Mapping[Status, str],
) -> Finding:
    """The finding for pairs with the same status and message; `name_of(rank)` names an end of a pair."""
    names = [" - ".join(map(name_of, result.pair)) for result in pairs]
    parts = [message] if message else []
    if status != "fail":
        all_reduce = format_rates([result.all_reduce for result in pairs])
        all_gather = format_rates([result.all_gather for result in pairs])
        parts.insert(0, f"all-reduce {all_reduce}, all-gather {all_gather}")
    return Finding(
        check=check,
        status=status,
        message=f"{first_names(names, 'pairs')}: {'; '.join(parts)}",
        fix=fixes[status],
        nodes=tuple(dict.fromkeys(nodes[rank] for result in pairs for rank in result.pair)),
    )


def format_rates(rates: Sequence[float]) -> str:
    """Rates in GB/s: one, or from the least to the most."""
    least, most = (f"{rate / 1e9:.2g}" for rate in (min(rates), max(rates)))
    return f"{least} GB/s" if least == most else f"{least} to {most} GB/s"


def slower_end_mbps(first: RankReport, second: RankReport) -> int:
    """Mb/s of the slower end of a link, as far as the ends report it; InfiniBand where NCCL would use it. 0
    if neither does.
    """
    networks = [report.network for report in (first, second) if report.network]
    cuda = all(report.device and report.device.is_cuda for report in (first, second))
    infiniband = [network.infiniband_mbps for network in networks if network.infiniband_mbps]
    if cuda and len(infiniband) == 2 and os.environ.get("NCCL_IB_DISABLE") != "1":
        return min(infiniband)
    return min((network.speed_mbps for network in networks if network.speed_mbps), default=0)


def max_mbps(report: RankReport) -> float:
    """Mb/s that the backend is expected to fill."""
    return float("inf") if report.device and report.device.is_cuda else GLOO_MAX_MBPS
