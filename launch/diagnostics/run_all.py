"""The checkup from beginning to end: each rank by itself, all together, and what follows from it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.diagnostics import bandwidth, cross_node, gpus, machine, network, software
from launch.diagnostics.exchange import Meeting
from launch.diagnostics.report import Finding, Report, about, findings_of_json, leaders_of, nodes_of, tried
from launch.runtime.world import World

ALONE = 10.0
"""seconds that a check of one node gets; most need milliseconds"""
IMPORT = 120.0
"""seconds that the import of torch gets: thousands of files, from a cold network disk"""
LATER = 10.0
"""seconds that a rank may be later with its results than rank zero, which has waited for it on the way"""
Point = tuple[str, int] | None


# each rank by itself ----------------------------------------------------------------------------------------


def alone(world: World, environment: Mapping[str, str], point: Point, folder: Path) -> Report:
    """What this rank finds without the others. The first of a node also looks at what its ranks share."""
    report = about(world, environment)

    def learn(name: str, seconds: float, ask: Callable[[], Any]) -> None:
        def keep() -> list[Finding]:
            report.facts[name] = ask()
            return []

        report.findings += tried(name, seconds, keep)

    def check(name: str, look: Callable[[], Any]) -> None:
        report.findings += tried(name, ALONE, look)

    learn("software", IMPORT, lambda: software.facts(environment))
    learn("gpu", 3 * ALONE, lambda: gpus.facts(world, environment))
    learn("cpu", ALONE, lambda: machine.cpu_facts(environment))
    if world.local_rank > 0:
        return report
    learn("network", 3 * ALONE, lambda: network.facts(environment, point[0] if point else None))
    learn("gpus", 2 * ALONE, gpus.present)
    check("GPUs in use", lambda: gpus.in_use(report.facts["gpus"], environment.get("CUDA_VISIBLE_DEVICES")))
    check("shared memory", machine.shared_memory)
    check("open files", machine.open_files)
    check("locked memory", machine.locked_memory)
    check("disk", lambda: machine.disk(folder))
    if "software" in report.facts:
        packages, cuda = (
            report.facts["software"]["packages"],
            report.facts["software"]["versions"].get("cuda"),
        )
        check("extensions", lambda: machine.extensions(machine.extension_folder(environment, cuda), packages))
    if point is None:
        check("port", network.free_port)
    elif world.rank == 0:
        report.findings.append(Finding(check="port", found=f"the ranks meet at {point[0]}:{point[1]}"))
    return report


# all together -----------------------------------------------------------------------------------------------


def plan(reports: list[Report], folder: Path) -> dict[str, Any]:
    """What the ranks that came shall do together."""
    cuda = all(report.facts.get("gpu", {}).get("device", "cpu").startswith("cuda") for report in reports)
    return {
        "ranks": [report.rank for report in reports],
        "leaders": [report.rank for report in leaders_of(reports).values()],
        "rounds": bandwidth.neighbours(reports),
        "backend": "nccl" if cuda else "gloo",
        "folder": str(machine.existing(folder)),
        "token": secrets.token_hex(4),
    }


def patience(plan: Mapping[str, Any]) -> float:
    """Seconds in which `together` must have ended on all ranks, whatever hangs."""
    turns = len(plan["rounds"]) * (bandwidth.PAIR[plan["backend"]] + 3)
    return turns + cross_node.CLOCKS + cross_node.SEEN + 3 * cross_node.STEP


def together(
    meeting: Meeting, plan: Mapping[str, Any], report: Report, point: tuple[str, int]
) -> dict[str, Any]:
    """What this rank finds with the others, as JSON's own types. Each part ends by itself and cannot stop the
    next.
    """
    results: dict[str, Any] = {"findings": []}

    def take(name: str, do: Callable[[], Any]) -> None:
        def keep() -> list[Finding]:
            results[name] = do()
            return []

        results["findings"] += [finding.__dict__ for finding in tried(name, patience(plan), keep)]

    device = report.facts["gpu"]["device"] if plan["backend"] == "nccl" else "cpu"
    leaders, folder = plan["leaders"], Path(plan["folder"])
    if len(leaders) > 1 and meeting.rank in leaders:
        take("clock", lambda: cross_node.clock(meeting, leaders))
        take("shared folder", lambda: cross_node.shared_folder(meeting, leaders, folder, plan["token"]))
    take("bandwidth", lambda: bandwidth.measure(meeting, point, plan["token"], plan["rounds"], device))
    return results


# what follows -----------------------------------------------------------------------------------------------


def verdict(
    reports: list[Report],
    results: Mapping[int, Mapping[str, Any]],
    world: World,
    environment: Mapping[str, str],
    folder: str,
) -> list[Finding]:
    """All findings, of one node or many."""
    leaders = leaders_of(reports)
    names = {report.rank: node for node, mine in nodes_of(reports).items() for report in mine}
    several = len(leaders) > 1 or world.world_size > world.local_world_size
    found = [cross_node.present(reports, world, environment)] if world.launcher != "python" else []
    for report in reports:
        own = report.findings + findings_of_json(results.get(report.rank, {}).get("findings", []))
        found += [Finding(**{**finding.__dict__, "nodes": (names[report.rank],)}) for finding in own]
    # a fact that could not be had is a finding already
    know = {
        name: [report for report in reports if name in report.facts]
        for name in ("network", "software", "gpu", "gpus", "cpu")
    }
    found += network.names(know["network"], several) + network.link(know["network"], several)
    found += software.same_versions(know["software"]) + software.same_environment(know["software"])
    found += gpus.mapped([report for report in know["gpu"] if "gpus" in leaders[names[report.rank]].facts])
    found += machine.cpus(know["cpu"], world.local_world_size)
    gone = {report.rank for report in reports if results and report.rank not in results}
    silent = [names[rank] for rank in sorted(gone)]
    if silent:
        fix = "its own lines on the screen may say more; the node is overloaded, or the network drops it"
        words = f"no word any more since the ranks met, from {', '.join(dict.fromkeys(silent))}"
        found.append(
            Finding(check="ranks", status="fail", found=words, fix=fix, nodes=tuple(dict.fromkeys(silent)))
        )
    of_leaders = {node: results.get(leader.rank, {}) for node, leader in leaders.items()}
    clocks = {node: tuple(result["clock"]) for node, result in of_leaders.items() if result.get("clock")}
    found += cross_node.clocks(clocks, next(iter(leaders)))
    folders = {
        node: result["shared folder"] for node, result in of_leaders.items() if result.get("shared folder")
    }
    found += cross_node.one_folder(folders, names, folder)
    pairs = [
        pair
        for result in results.values()
        for pair in result.get("bandwidth", [])
        if not gone & set(pair["pair"])
    ]
    return found + bandwidth.judge(pairs, reports)
