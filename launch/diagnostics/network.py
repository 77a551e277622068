"""Names, addresses and interfaces of a node, and whether the nodes can reach each other with them. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from launch.diagnostics.findings import Finding, Outcome, merge_equal
from launch.diagnostics.rank_report import RankReport, node_leaders
from launch.diagnostics.system_info import NetworkInfo
from launch.runtime.store import addresses_of, owner_of

TORCHRUN_PORT = 29500
"""its default"""
VIRTUAL_INTERFACE = re.compile(r"lo$|docker|virbr|br-|veth.*@")
"""interfaces that lead to no other machine"""


def network_info(environment: Mapping[str, str], master: str | None) -> NetworkInfo:
    """The interfaces of this node, what its own name resolves to, and which of them leads to `master`."""
    interfaces = {
        name: [
            entry.address.partition("%")[0]
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, entries in psutil.net_if_addrs().items()
    }
    source = source_address(master) if master else None
    route = next((name for name, addresses in interfaces.items() if source in addresses), None)
    stats = psutil.net_if_stats().get(route or "")
    return NetworkInfo(
        host_addresses=addresses_of(socket.gethostname()),
        master=master,
        interfaces={name: addresses for name, addresses in interfaces.items() if addresses},
        route=route,
        speed_mbps=max(stats.speed, 0) if stats else 0,
        mtu=stats.mtu if stats else 0,
        infiniband_mbps=infiniband_mbps(),
        gloo_ifname=environment.get("GLOO_SOCKET_IFNAME"),
        nccl_ifname=environment.get("NCCL_SOCKET_IFNAME"),
    )


def source_address(master: str) -> str | None:
    """The address of this node from which it reaches `master`. Nothing is sent: connecting UDP only looks up
    the route.
    """
    for address in addresses_of(master):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return None


def infiniband_mbps(devices: Path = Path("/sys/class/infiniband")) -> int:
    """Mb/s of the fastest InfiniBand port; 0 without one."""
    gigabits = [0.0]
    for path in devices.glob("*/ports/*/rate"):
        with contextlib.suppress(OSError, ValueError):
            gigabits.append(float(path.read_text().split()[0]))  # "400 Gb/sec (4X NDR)"
    return int(max(gigabits) * 1000)


def check_port(port: int = TORCHRUN_PORT) -> Iterator[Finding]:
    """Without a launcher: whether torchrun's default port is free on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            message = f"{port}, torchrun's default, is taken{owner_of(port)}"
            fix = f"torchrun --standalone (one node), or --master_port={port + 1}"
            yield Finding(check="port", status="warn", message=message, fix=fix)
            return
    yield Finding(check="port", message=f"{port}, torchrun's default, is free")


# host names -------------------------------------------------------------------------------------------------


def network_by_node(reports: list[RankReport]) -> dict[str, NetworkInfo]:
    """The network of each node that could report it."""
    return {node: leader.network for node, leader in node_leaders(reports).items() if leader.network}


def hostname_findings(reports: list[RankReport], multi_node: bool) -> list[Finding]:
    """Whether torch will bind to an address that the other nodes can reach."""
    networks = network_by_node(reports)
    # nodes that reach the master by loopback are one machine after all (a SLURM for tests)
    one_machine = len(networks) > 1 and all(network.route == "lo" for network in networks.values())
    outcomes = {
        node: hostname_outcome(network, multi_node and not one_machine) for node, network in networks.items()
    }
    return merge_equal("hostname", outcomes)


def hostname_outcome(network: NetworkInfo, multi_node: bool) -> Outcome:
    """The outcome for one node: gloo binds to the address of its name, unless a variable names a device."""
    route = network.route if network.route not in (None, "lo") else external_interface(network)
    fix = f"on that node: export GLOO_SOCKET_IFNAME={route} NCCL_SOCKET_IFNAME={route}"
    for variable, value, matching in (
        ("GLOO_SOCKET_IFNAME", network.gloo_ifname, gloo_interfaces),
        ("NCCL_SOCKET_IFNAME", network.nccl_ifname, nccl_interfaces),
    ):
        if not value:
            continue
        chosen = matching(value, list(network.interfaces))
        if not chosen:
            return Outcome("fail", f"{variable}={value}, but there are {', '.join(network.interfaces)}", fix)
        if multi_node and chosen == ["lo"]:
            return Outcome("fail", f"{variable}={value} reaches no other node", fix)
    address = next(iter(network.host_addresses), None)
    if not multi_node:
        return Outcome(
            "pass", f"resolves to {address}" if address else "not resolved, and not needed on one node"
        )
    if network.gloo_ifname:
        return Outcome("pass", f"{network.gloo_ifname}, by GLOO_SOCKET_IFNAME")
    return address_outcome(network, address, fix)


def address_outcome(network: NetworkInfo, address: str | None, fix: str) -> Outcome:
    """Whether other nodes can reach `address`, which the node's own name resolves to."""
    or_hosts = " (or its address into its /etc/hosts)"
    if address is None:
        return Outcome("fail", "its own name cannot be resolved: gloo falls back to loopback", fix + or_hosts)
    if ipaddress.ip_address(address).is_loopback:
        message = f"its own name is {address} in its /etc/hosts: the other nodes would connect to themselves"
        return Outcome("fail", message, fix + or_hosts)
    interface = next((name for name, addresses in network.interfaces.items() if address in addresses), None)
    if interface is None:
        return Outcome("fail", f"its own name is {address}, which no interface of it has", fix + or_hosts)
    message = f"its own name is {address} ({interface})"
    if network.route not in (interface, "lo", None):
        return Outcome("warn", f"{message}, but it reaches the master by {network.route}", fix)
    return Outcome("pass", message)


def gloo_interfaces(ifname: str, interfaces: list[str]) -> list[str]:
    """The interfaces that GLOO_SOCKET_IFNAME selects: it lists names."""
    return [name for name in interfaces if name in ifname.split(",")]


def nccl_interfaces(ifname: str, interfaces: list[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME selects: it lists prefixes, after `=` names, after `^`
    exclusions.
    """
    exact, entries = "=" in ifname[:2], ifname.lstrip("^=").split(",")
    matching = [
        name
        for name in interfaces
        if any(name == entry if exact else name.startswith(entry) for entry in entries)
    ]
    return [name for name in interfaces if name not in matching] if ifname.startswith("^") else matching


def external_interface(network: NetworkInfo) -> str:
    """An interface to other machines, for advice where the route is not known."""
    external = [name for name in network.interfaces if not VIRTUAL_INTERFACE.match(name)]
    return external[0] if external else "eth0"


# links ------------------------------------------------------------------------------------------------------


def link_findings(reports: list[RankReport], multi_node: bool) -> list[Finding]:
    """The interface by which each node reaches the master, and whether all have the same MTU."""
    if not multi_node:
        return []
    networks = network_by_node(reports)
    findings = merge_equal("network", {node: link_outcome(network) for node, network in networks.items()})
    # the master reaches itself by its loopback, which has an MTU of its own
    mtus = {node: network.mtu for node, network in networks.items() if network.mtu and network.route != "lo"}
    if len(set(mtus.values())) > 1:
        message = f"the MTU differs: {', '.join(f'{node} {mtu}' for node, mtu in mtus.items())}"
        fix = (
            "large packets between them may get lost, which looks like a hang: one MTU on all nodes (ip "
            "link set DEV mtu N)"
        )
        findings.append(Finding(check="network", status="warn", message=message, fix=fix, nodes=tuple(mtus)))
    return findings


def link_outcome(network: NetworkInfo) -> Outcome:
    """The outcome for one node."""
    if network.route is None:
        fix = "MASTER_ADDR must be a name or address of the first node that all nodes can resolve"
        return Outcome("fail", f"no route to the master {network.master}", fix)
    speed = format_link_speed(network.speed_mbps) if network.speed_mbps else "speed unknown"
    infiniband = (
        f", InfiniBand {format_link_speed(network.infiniband_mbps)}" if network.infiniband_mbps else ""
    )
    return Outcome("pass", f"{network.route}, {speed}, MTU {network.mtu}{infiniband}")


def format_link_speed(megabits: float) -> str:
    """The speed of a link, as networks state it."""
    return f"{megabits / 1000:g} Gb/s" if megabits >= 1000 else f"{megabits:g} Mb/s"
