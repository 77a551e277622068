"""What a check finds, and what a rank tells about itself. Plain data. Imports no torch."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from launch.runtime.store import within
from launch.runtime.text import join_names
from launch.runtime.world import World

Status = Literal["pass", "warn", "fail"]
NAMED = 4
"""nodes, or different values, that are named one by one before the rest is only counted"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says."""

    check: str
    status: Status = "pass"
    found: str
    fix: str = ""
    """what to do, in words; empty where nothing is to be done"""
    nodes: tuple[str, ...] = ()
    """whom it is about"""


@dataclass(kw_only=True)
class Report:
    """What one rank tells about itself."""

    rank: int = 0
    local_rank: int = 0
    host: str = ""
    node: int = 0
    """the number that the launcher gave to the node; 0 if it gives none"""
    facts: dict[str, Any] = field(default_factory=dict)
    """what only a comparison can judge"""
    findings: list[Finding] = field(default_factory=list)
    """what was judged on the spot"""

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types."""
        return asdict(self)

    @staticmethod
    def of_json(content: Mapping[str, Any]) -> Report:
        """The report that `to_json` took apart."""
        return Report(**{**content, "findings": findings_of_json(content["findings"])})


def findings_of_json(content: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Findings that travelled as JSON."""
    return [Finding(**{**item, "nodes": tuple(item["nodes"])}) for item in content]


def about(world: World, environment: Mapping[str, str]) -> Report:
    """An empty report of this rank. SLURM's name for a node comes first: two of them may be one machine, in a
    test.
    """
    host = environment.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    return Report(rank=world.rank, local_rank=world.local_rank, host=host, node=world.node)


# nodes ------------------------------------------------------------------------------------------------------


def nodes_of(reports: Iterable[Report]) -> dict[str, list[Report]]:
    """The reports by node, in the order of ranks. Nodes of one name (containers) are told apart by their
    number.
    """
    ordered = sorted(reports, key=lambda report: report.rank)
    places = dict.fromkeys((report.host, report.node) for report in ordered)
    shared = Counter(host for host, _ in places)
    nodes: dict[str, list[Report]] = {}
    for report in ordered:
        name = report.host if shared[report.host] == 1 else f"{report.host}#{report.node}"
        nodes.setdefault(name, []).append(report)
    return nodes


def leaders_of(reports: Iterable[Report]) -> dict[str, Report]:
    """The first rank of each node, which speaks for it."""
    return {node: mine[0] for node, mine in nodes_of(reports).items()}


def listed(names: Sequence[str], what: str = "nodes") -> str:
    """Names as one would say them; many are counted."""
    return join_names(names, NAMED, what)


def by_value(check: str, values: Mapping[str, tuple[Status, str, str]]) -> list[Finding]:
    """One finding for each different (status, found, fix), with all nodes of which it holds."""
    nodes: dict[tuple[Status, str, str], list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return [
        Finding(check=check, status=s, found=f, fix=x, nodes=tuple(names))
        for (s, f, x), names in nodes.items()
    ]


# patience ---------------------------------------------------------------------------------------------------


def tried(check: str, seconds: float, function: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; one that raises or hangs is itself a finding, and does not keep the others
    from being made.
    """
    try:
        return within(seconds, lambda: list(function()))
    except TimeoutError as error:
        return [
            Finding(
                check=check,
                status="fail",
                found=str(error),
                fix=HANGS.get(check, "look at the node: it hangs there"),
            )
        ]
    except Exception as error:
        return [
            Finding(
                check=check,
                status="fail",
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            )
        ]


HANGS = {
    "disk": "the file system does not answer: look at its server and mount (`df`, `dmesg`), or choose another run_dir=",
    "gpus": "the driver does not answer: `nvidia-smi` and `dmesg | grep -i xid` tell more; reboot the node or leave it out",
}


def number(environment: Mapping[str, str], name: str) -> int | None:
    """The whole number in a variable, if there is one."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
