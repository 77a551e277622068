"""Names, addresses and interfaces: what this node knows of them, and what that means among several. Imports
no torch.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from launch.diagnostics.report import Finding, Report, Status, by_value, leaders_of
from launch.runtime.store import addresses_of, owner_of

DEFAULT_PORT = 29500
"""torchrun's"""


def facts(environment: Mapping[str, str], master: str | None) -> dict[str, Any]:
    """The interfaces of this node, what its own name stands for, and by which interface it reaches the
    master.
    """
    interfaces = {
        name: [
            entry.address.partition("%")[0]
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, entries in psutil.net_if_addrs().items()
    }
    stats = psutil.net_if_stats()
    source = source_for(master) if master else None
    used = next((name for name, addresses in interfaces.items() if source in addresses), None)
    return {
        "hostname": socket.gethostname(),
        "resolves": addresses_of(socket.gethostname()),
        "master": master,
        "interfaces": {name: addresses for name, addresses in interfaces.items() if addresses},
        "route": used,
        "address": source,
        # Mb/s; 0 where the interface does not tell
        "speed": max(stats[used].speed, 0) if used in stats else 0,
        "mtu": stats[used].mtu if used in stats else 0,
        "infiniband": infiniband_speed(),
        "gloo": environment.get("GLOO_SOCKET_IFNAME"),
        "nccl": environment.get("NCCL_SOCKET_IFNAME"),
    }


def source_for(master: str) -> str | None:
    """The address of this node from which it reaches `master`. Nothing is sent: connecting UDP only looks the
    route up.
    """
    for address in addresses_of(master):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return None


def infiniband_speed(devices: Path = Path("/sys/class/infiniband")) -> int:
    """Mb/s of the fastest InfiniBand port; 0 without one."""
    rates = [0.0]
    for path in devices.glob("*/ports/*/rate"):
        with contextlib.suppress(OSError, ValueError):
            rates.append(float(path.read_text().split()[0]))  # "400 Gb/sec (4X NDR)"
    return int(max(rates) * 1000)


# judged on the spot -----------------------------------------------------------------------------------------


def free_port(port: int = DEFAULT_PORT) -> Iterator[Finding]:
    """Without a launcher: whether torchrun's own port can be had on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            fix = f"torchrun --standalone (one node), or --master_port={port + 1}"
            yield Finding(
                check="port",
                status="warn",
                found=f"{port}, torchrun's default, is taken{owner_of(port)}",
                fix=fix,
            )
            return
    yield Finding(check="port", found=f"{port}, torchrun's default, is free")


# judged among the nodes -------------------------------------------------------------------------------------


def names(reports: list[Report], several: bool) -> list[Finding]:
    """Whether torch will bind to an address that the other nodes can reach."""
    leaders = leaders_of(reports)
    # nodes that reach the master by loopback are one machine after all (a SLURM for tests)
    several = several and not (
        len(leaders) > 1 and all(leader.facts["network"]["route"] == "lo" for leader in leaders.values())
    )
    return by_value(
        "names", {node: name(report.facts["network"], several) for node, report in leaders.items()}
    )


def name(facts: Mapping[str, Any], several: bool) -> tuple[Status, str, str]:
    """Status, what was found, and the fix, for one node."""
    route = facts["route"] if facts["route"] not in (None, "lo") else first_real(facts)
    fix = f"on that node: export GLOO_SOCKET_IFNAME={route} NCCL_SOCKET_IFNAME={route}"
    for variable, backend in (("GLOO_SOCKET_IFNAME", "gloo"), ("NCCL_SOCKET_IFNAME", "nccl")):
        said = facts[backend]
        chosen = matching(said, list(facts["interfaces"]), backend) if said else []
        if said and not chosen:
            return "fail", f"{variable}={said}, but there are {', '.join(facts['interfaces'])}", fix
        if several and chosen == ["lo"]:
            return "fail", f"{variable}={said} reaches no other node", fix
    first = next(iter(facts["resolves"]), None)
    if not several:
        return "pass", f"its own name is {first or 'not resolved, and need not be on one node'}", ""
    if facts["gloo"]:
        return "pass", f"{facts['gloo']}, by GLOO_SOCKET_IFNAME", ""
    also = " (or its address into its /etc/hosts)"
    if first is None:
        return "fail", "its own name cannot be resolved there: gloo falls back to loopback", fix + also
    if ipaddress.ip_address(first).is_loopback:
        return (
            "fail",
            f"its own name is {first} in its /etc/hosts: the other nodes would connect to themselves",
            fix + also,
        )
    uses = next((name for name, addresses in facts["interfaces"].items() if first in addresses), None)
    if uses is None:
        return "fail", f"its own name is {first}, which no interface of it has", fix + also
    if facts["route"] not in (uses, "lo", None):
        return "warn", f"its own name is {first} ({uses}), but it reaches the master by {facts['route']}", fix
    return "pass", f"its own name is {first} ({uses})", ""


def matching(said: str, interfaces: list[str], backend: str) -> list[str]:
    """The interfaces that a variable means: gloo takes names; NCCL beginnings of names, after = names, after
    ^ all others.
    """
    if backend == "gloo":
        return [name for name in interfaces if name in said.split(",")]
    wanted = said.lstrip("^=").split(",")
    hit = [
        name
        for name in interfaces
        if any(name == word if "=" in said[:2] else name.startswith(word) for word in wanted)
    ]
    return [name for name in interfaces if name not in hit] if said.startswith("^") else hit


def first_real(facts: Mapping[str, Any]) -> str:
    """An interface to other machines, for advice where the route is not known."""
    real = [name for name in facts["interfaces"] if not re.match(r"lo$|docker|virbr|br-|veth.*@", name)]
    return real[0] if real else "eth0"


def link(reports: list[Report], several: bool) -> list[Finding]:
    """The interface that carries the route to the master, on each node."""
    if not several:
        return []
    leaders = leaders_of(reports)
    packets = {
        node: report.facts["network"]["mtu"]
        for node, report in leaders.items()
        if report.facts["network"]["mtu"]
    }
    values: dict[str, tuple[Status, str, str]] = {}
    for node, report in leaders.items():
        facts = report.facts["network"]
        if facts["route"] is None:
            fix = "MASTER_ADDR must be a name or address of the first node that all nodes can resolve"
            values[node] = "fail", f"no route to the master {facts['master']}", fix
        else:
            speed = spoken(facts["speed"]) if facts["speed"] else "speed not told"
            band = f", InfiniBand {spoken(facts['infiniband'])}" if facts["infiniband"] else ""
            values[node] = "pass", f"{facts['route']}, {speed}, MTU {facts['mtu']}{band}", ""
    found = by_value("network", values)
    # the master's own route may be its loopback, with an MTU of its own
    outer = {node: mtu for node, mtu in packets.items() if leaders[node].facts["network"]["route"] != "lo"}
    if len(set(outer.values())) > 1:
        words = ", ".join(f"{node} {mtu}" for node, mtu in outer.items())
        fix = "large packets between them may vanish, which looks like a hang: one MTU on all nodes (ip link set DEV mtu N)"
        found.append(
            Finding(
                check="network", status="warn", found=f"the MTU differs: {words}", fix=fix, nodes=tuple(outer)
            )
        )
    return found


def spoken(megabits: float) -> str:
    """A speed of a link in words."""
    return f"{megabits / 1000:g} Gb/s" if megabits >= 1000 else f"{megabits:g} Mb/s"
