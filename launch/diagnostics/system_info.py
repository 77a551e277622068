"""What a rank reports about its machine: plain dataclasses that travel between ranks as JSON. Imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SoftwareInfo:
    """What a rank runs."""

    versions: dict[str, str]
    """by name: python, torch, nccl, driver, ...; `code` is a digest of this project's source"""
    executable: str
    site_packages: str
    """the directory that holds torch"""
    environment: dict[str, str]
    """variables that libraries read"""


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """The device of a rank, as a run would choose it, and what torch sees."""

    device: str
    """`cpu` or `cuda:N`"""
    error: str = ""
    """why there is none, with the fix behind a semicolon"""
    gpu_count: int = 0
    """GPUs that torch sees"""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES"""
    cuda_version: str | None = None
    """the CUDA that torch was built for"""

    @property
    def is_cuda(self) -> bool:
        """Whether the rank trains on a GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU of a node, as nvidia-smi reports it."""

    index: str
    uuid: str
    name: str
    used_mib: int
    total_mib: int
    """0 where nvidia-smi reports no number"""


@dataclass(frozen=True, kw_only=True)
class CPUInfo:
    """The CPUs that a rank may use."""

    affinity: list[int]
    quota: float | None
    """CPUs that the container's cgroup allows"""
    machine_cpus: int
    omp_threads: int | None
    """OMP_NUM_THREADS"""


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """The network of a node."""

    host_addresses: list[str]
    """what the node's own name resolves to"""
    master: str | None
    """MASTER_ADDR"""
    interfaces: dict[str, list[str]]
    """addresses by interface"""
    route: str | None
    """the interface by which this node reaches the master"""
    speed_mbps: int
    """of that interface, in Mb/s; 0 where it does not report any"""
    mtu: int
    infiniband_mbps: int
    """of the fastest InfiniBand port; 0 without one"""
    gloo_ifname: str | None
    """GLOO_SOCKET_IFNAME"""
    nccl_ifname: str | None
    """NCCL_SOCKET_IFNAME"""
