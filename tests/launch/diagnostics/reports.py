"""Reports of healthy ranks, for tests to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launch.diagnostics.bandwidth import PairBandwidth
from launch.diagnostics.findings import Finding
from launch.diagnostics.rank_report import RankReport
from launch.diagnostics.system_info import GPU, CPUInfo, DeviceInfo, NetworkInfo, SoftwareInfo

NETWORK = NetworkInfo(
    host_addresses=["10.0.0.1"],
    master="n1",
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]},
    route="eth0",
    speed_mbps=10_000,
    mtu=1500,
    infiniband_mbps=0,
    gloo_ifname=None,
    nccl_ifname=None,
)
VERSIONS = {"python": "3.12.1", "torch": "2.14.1", "code": "00000000", "driver": "580.1"}
SOFTWARE = SoftwareInfo(versions=VERSIONS, executable="/env/bin/python", site_packages="/env", environment={})
CPU = CPUInfo(affinity=[0, 1, 2, 3], quota=None, machine_cpus=4, omp_threads=1)
ON_CPU = DeviceInfo(device="cpu")
H100 = [GPU(index=str(n), uuid=f"GPU-{n}", name="H100", used_mib=0, total_mib=80_000) for n in range(2)]


def report(rank: int, host: str, local_rank: int = 0, **changes: Any) -> RankReport:
    """A healthy rank; `changes` are other values of its fields."""
    healthy = RankReport(
        rank=rank,
        local_rank=local_rank,
        host=host,
        network=NETWORK,
        software=SOFTWARE,
        device=ON_CPU,
        gpus=[],
        cpu=CPU,
    )
    return replace(healthy, **changes)


def network_report(rank: int, host: str, **changes: Any) -> RankReport:
    """A rank on a node whose network has these values."""
    return report(rank, host, network=replace(NETWORK, **changes))


def software_report(rank: int, host: str, **changes: Any) -> RankReport:
    """A rank that runs this software."""
    return report(rank, host, software=replace(SOFTWARE, **changes))


def cpu_report(rank: int, host: str, local_rank: int = 0, **changes: Any) -> RankReport:
    """A rank that may use these CPUs."""
    return report(rank, host, local_rank, cpu=replace(CPU, **changes))


def gpu_reports(*devices: str, **changes: Any) -> list[RankReport]:
    """The ranks of one node with two GPUs, on these devices."""
    return [
        report(n, "n1", n, gpus=H100, device=DeviceInfo(**{"device": device, "gpu_count": 2, **changes}))
        for n, device in enumerate(devices)
    ]


def pair(first: int, second: int, rate: float = 1e9, error: str = "") -> PairBandwidth:
    """What two ranks measured."""
    if error:
        return PairBandwidth(pair=(first, second), error=error)
    return PairBandwidth(pair=(first, second), all_reduce=rate, all_gather=rate / 2)


def only(findings: list[Finding]) -> Finding:
    """The one finding of a list."""
    (finding,) = findings
    return finding
