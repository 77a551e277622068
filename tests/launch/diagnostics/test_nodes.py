"""What rank zero concludes from the reports of several ranks, which are made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.diagnostics import bandwidth, cross_node, gpus, network, software
from launch.diagnostics.bandwidth_findings import bandwidth_findings
from launch.diagnostics.cross_node import ClockOffset, SharedStorageResult
from launch.diagnostics.exchange import from_json, to_json
from launch.diagnostics.findings import Finding, first_names
from launch.diagnostics.rank_report import RankReport, group_by_node, node_leaders
from launch.diagnostics.run_all import JointResults, all_findings, make_plan
from launch.runtime.world import World
from tests.launch.diagnostics.reports import (
    H100,
    SOFTWARE,
    VERSIONS,
    gpu_reports,
    network_report,
    only,
    pair,
    report,
    software_report,
)

# names, interfaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({}, "pass", "10.0.0.1 (eth0)"),
        ({"host_addresses": ["127.0.1.1"]}, "fail", "the other nodes would connect to themselves"),
        ({"host_addresses": []}, "fail", "cannot be resolved"),
        ({"host_addresses": ["10.9.9.9"]}, "fail", "no interface of it has"),
        ({"route": "ib0"}, "warn", "reaches the master by ib0"),
        (
            {"host_addresses": ["127.0.1.1"], "gloo_ifname": "eth0"},
            "pass",
            "eth0, by GLOO_SOCKET_IFNAME",
        ),
        ({"gloo_ifname": "eth7"}, "fail", "GLOO_SOCKET_IFNAME=eth7, but there are lo, eth0, ib0"),
        ({"gloo_ifname": "lo"}, "fail", "reaches no other node"),
        ({"nccl_ifname": "=eth"}, "fail", "NCCL_SOCKET_IFNAME==eth"),
        ({"nccl_ifname": "^lo,docker"}, "pass", "10.0.0.1 (eth0)"),
        ({"nccl_ifname": "eth"}, "pass", "10.0.0.1 (eth0)"),
    ],
)
def test_the_interface_that_torch_takes(changes: dict[str, Any], status: str, message: str) -> None:
    finding = only(network.hostname_findings([network_report(0, "n1", **changes)], multi_node=True))
    assert (finding.status, message in finding.message) == (status, True), finding
    if status == "fail":
        assert "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in finding.fix


def test_names_do_not_matter_on_one_node() -> None:
    reports = [network_report(0, "n1", host_addresses=["127.0.1.1"])]
    assert only(network.hostname_findings(reports, multi_node=False)).status == "pass"


def test_nodes_that_are_one_machine() -> None:
    both = [network_report(rank, f"n{rank}", host_addresses=["127.0.0.1"], route="lo") for rank in range(2)]
    assert only(network.hostname_findings(both, multi_node=True)).status == "pass"
    assert only(network.hostname_findings(both[:1], multi_node=True)).status == "fail"


def test_the_link() -> None:
    reports = [report(0, "n1"), network_report(1, "n2", mtu=9000)]
    mtu = network.link_findings(reports, multi_node=True)[-1]
    assert (mtu.status, mtu.message) == ("warn", "the MTU differs: n1 1500, n2 9000")
    lost = only(network.link_findings([network_report(0, "n1", route=None, mtu=0)], multi_node=True))
    assert (lost.status, lost.message) == ("fail", "no route to the master n1")


# versions, environment, GPUs --------------------------------------------------------------------------------


def with_versions(*torch: str) -> list[RankReport]:
    return [
        software_report(n, f"n{n}", versions={**VERSIONS, "torch": version})
        for n, version in enumerate(torch)
    ]


def test_versions_that_differ() -> None:
    finding = only(software.version_findings(with_versions("2.14.1", "2.14.1", "2.11.0")))
    assert (finding.status, finding.message) == ("fail", "torch is 2.14.1 on n0, n1; 2.11.0 on n2")
    assert (finding.fix, finding.nodes) == ("pip install torch==2.14.1 on n2", ("n2",))
    assert only(software.version_findings(with_versions("2.14.1", "2.14.1"))).status == "pass"
    driver = [report(0, "n1"), software_report(1, "n2", versions={**VERSIONS, "driver": "570.1"})]
    assert only(software.version_findings(driver)).status == "warn"
    executable = [report(0, "n1"), software_report(1, "n2", executable="/usr/bin/python")]
    assert "/usr/bin/python on n2" in only(software.version_findings(executable)).message


def test_variables_that_differ() -> None:
    reports = [software_report(0, "n1", environment={"NCCL_ALGO": "Ring"}), report(1, "n2")]
    assert only(software.environment_findings(reports)).message == "NCCL_ALGO: Ring on n1; not set on n2"


def test_gpus() -> None:
    assert only(gpus.gpu_findings([report(0, "n1")])).message == "none: ranks run on the CPU, by gloo"
    two = only(gpus.gpu_findings(gpu_reports("cuda:0", "cuda:1")))
    assert two.message == "2 x H100; rank 0: GPU 0, rank 1: GPU 1"
    one = only(gpus.gpu_findings(gpu_reports("cuda:0", visible_devices="1", gpu_count=1)))
    assert one.message == "1 x H100; rank 0: GPU 1"
    twice = only(gpus.gpu_findings(gpu_reports("cuda:0", "cuda:0")))
    assert (twice.status, twice.message) == ("fail", "rank 0 and 1: GPU 0")
    blind = only(gpus.gpu_findings(gpu_reports("cpu", gpu_count=0, cuda_version="13.0")))
    assert (blind.status, blind.message) == ("fail", "nvidia-smi sees 2 GPU(s), torch none")
    hidden = only(gpus.gpu_findings(gpu_reports("cpu", gpu_count=0, visible_devices="")))
    assert hidden.status == "pass"
    mixed = only(gpus.gpu_findings([*gpu_reports("cuda:0"), report(1, "n2")]))
    assert (mixed.status, mixed.fix) == ("fail", "leave out n2")
    few = only(gpus.gpu_findings(gpu_reports("cpu", error="4 ranks on 2 GPU(s); start fewer")))
    assert (few.message, few.fix) == ("4 ranks on 2 GPU(s)", "start fewer")


# several nodes ----------------------------------------------------------------------------------------------


def test_ranks_that_are_missing() -> None:
    world = World(world_size=4, local_world_size=2, launcher="srun")
    reports = [report(0, "localhost"), report(1, "localhost", 1)]
    finding = cross_node.ranks_finding(reports, world, {"SLURM_STEP_NODELIST": "localhost,nowhere.invalid"})
    assert finding.message == (
        "expected 4 ranks on localhost, nowhere.invalid; saw 0-1 from localhost, none from nowhere.invalid"
    )
    assert finding.fix.startswith("nowhere.invalid cannot be resolved from here")
    elsewhere = cross_node.ranks_finding(reports, world, {})
    assert elsewhere.message == "expected 4 ranks; saw 0-1 from localhost, not 2-3"
    assert cross_node.ranks_finding(reports, World(world_size=2), {}).status == "pass"


def offset(ahead_s: float, error_s: float) -> ClockOffset:
    return ClockOffset(ahead_s=ahead_s, error_s=error_s)


def test_clocks() -> None:
    good, slow, wrong = cross_node.clock_findings(
        {"n2": offset(0.002, 0.001), "n3": offset(-5.0, 0.001), "n4": offset(90.0, 0.5)}, "n1"
    )
    assert (good.status, good.message) == ("pass", "at most 2.0 ms from n1 (± 1.0 ms)")
    assert (slow.status, slow.message, slow.nodes) == ("warn", "5.0 s behind n1 (± 1.0 ms)", ("n3",))
    assert (wrong.status, wrong.message) == ("fail", "90.0 s ahead of n1 (± 500.0 ms)")
    # the error may be all of it
    assert only(cross_node.clock_findings({"n2": offset(3.0, 2.5)}, "n1")).status == "pass"


def test_storage_that_is_not_shared(tmp_path: Path) -> None:
    results = {
        "n1": SharedStorageResult(missing_ranks=[1], seconds=5),
        "n2": SharedStorageResult(missing_ranks=[], seconds=0),
    }
    bad, good = cross_node.shared_storage_findings(results, {0: "n1", 1: "n2"}, str(tmp_path))
    assert (bad.status, bad.nodes) == ("fail", ("n1",))
    assert bad.message == f"{tmp_path}: does not see what n2 wrote there"
    assert good.status == "pass"


def test_bandwidth_against_the_link() -> None:
    reports = [report(n, f"n{n}") for n in range(4)]
    findings = bandwidth_findings([pair(0, 1), pair(1, 2, 2e8), pair(2, 3, error="timed out")], reports)
    assert [finding.status for finding in findings] == ["pass", "warn", "fail"]
    assert findings[0].message == (
        "n0 - n1: all-reduce 1 GB/s, all-gather 0.5 GB/s; the link has 10 Gb/s, that is 1.25 GB/s"
    )
    assert findings[2].message == "n2 - n3: timed out"
    fast = [network_report(n, f"n{n}", speed_mbps=400_000) for n in range(2)]
    assert only(bandwidth_findings([pair(0, 1)], fast)).status == "pass"  # gloo fills no such link


def test_bandwidth_against_the_other_pairs_where_the_speed_of_the_link_is_unknown() -> None:
    reports = [network_report(n, f"n{n}", speed_mbps=0) for n in range(6)]
    good, slow = bandwidth_findings([*(pair(n, n + 1) for n in range(4)), pair(4, 5, 4e8)], reports)
    assert (good.status, slow.status, slow.nodes) == ("pass", "warn", ("n4", "n5"))
    assert good.message.startswith("n0 - n1, n1 - n2, n2 - n3, n3 - n4: all-reduce 1 GB/s")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64, 65])
def test_neighbors_are_measured_in_few_rounds(ranks: int) -> None:
    rounds = bandwidth.neighbor_rounds([report(rank, f"n{rank}") for rank in range(ranks)])
    pairs = [pair for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs)) == {1: 0, 2: 1}.get(ranks, ranks)
    assert len(rounds) <= 3
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)


# reports ----------------------------------------------------------------------------------------------------


def test_nodes_and_their_leaders() -> None:
    reports = [report(0, "a"), report(1, "a", 1), report(2, "b"), replace(report(3, "b"), node=1)]
    assert list(group_by_node(reports)) == ["a", "b#0", "b#1"]
    assert [leader.rank for leader in node_leaders(reports).values()] == [0, 2, 3]
    assert bandwidth.neighbor_rounds(reports)[-1] == [(0, 1)]
    assert first_names([f"n{n}" for n in range(9)]) == "n0, n1, n2, n3 and 5 more nodes"


def test_reports_plans_and_results_travel_as_json() -> None:
    sent = report(1, "n1", gpus=H100)
    sent.findings = [Finding(check="disk", message="there", nodes=("n1",))]
    assert from_json(RankReport, to_json(sent)) == sent
    plan = make_plan([report(rank, f"n{rank}") for rank in range(3)], Path("/"))
    assert from_json(type(plan), to_json(plan)) == plan
    results = JointResults(clock=offset(1.0, 0.5), bandwidth=[pair(0, 1), pair(1, 2, error="lost")])
    assert from_json(JointResults, to_json(results)) == results


def test_what_a_rank_could_not_collect_is_left_out() -> None:
    """Each failed collection is a finding already; nothing else may fail for want of it."""
    failed = [Finding(check="network", status="fail", message="no answer within 30 s")]
    empty = report(1, "n2", network=None, software=None, device=None, cpu=None, gpus=None, findings=failed)
    reports = [report(0, "n1"), empty]
    results = {0: JointResults(bandwidth=[pair(0, 1)]), 1: JointResults()}
    world = World(world_size=2, launcher="environment")
    findings = all_findings(reports, results, world, {}, "/")
    assert [finding.check for finding in findings if finding.status == "fail"] == ["network"]
    versions = only([finding for finding in findings if finding.check == "versions"])
    assert versions.nodes == ("n1",)
    assert SOFTWARE.versions["torch"] in versions.message
