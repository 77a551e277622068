"""Among several nodes: who came, whether the clocks agree, whether all see one folder."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.diagnostics.exchange import Meeting
from launch.diagnostics.machine import file_system
from launch.diagnostics.report import Finding, Report, Status, by_value, listed, nodes_of
from launch.diagnostics.temp_files import scratch
from launch.runtime.store import addresses_of, spans
from launch.runtime.world import World

PINGS = 5
CLOCKS = 20.0
"""seconds that all clocks together get; a question and its answer take about a millisecond"""
SKEW_WARN, SKEW_FAIL = 1.0, 60.0
"""seconds; above the second, SLURM's munge and Kerberos soon refuse credentials"""
SEEN = 5.0
"""seconds in which a new file must be seen by all; it has a new name, which no cache can hold as absent"""
STEP = 5.0
"""seconds that a node may come later than the others to a step of the checkup"""


# who came ---------------------------------------------------------------------------------------------------


def hosts_of(environment: Mapping[str, str]) -> list[str]:
    """The nodes of a SLURM step: `n[1-2,07],m1` as n1, n2, n07, m1; none outside SLURM."""
    hosts = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", environment.get("SLURM_STEP_NODELIST", "")):
        before, _, rest = part.partition("[")
        inside, _, after = rest.partition("]")
        for item in inside.split(","):
            first, _, last = item.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [""]
            hosts += [f"{before}{str(number).zfill(len(first))}{after}" for number in numbers]
    return hosts


def present(reports: list[Report], world: World, environment: Mapping[str, str]) -> Finding:
    """Whether all ranks came, and where those are missing that did not."""
    nodes = nodes_of(reports)
    if len(reports) == world.world_size:
        return Finding(check="ranks", found=f"{len(reports)} of {world.world_size} came", nodes=tuple(nodes))
    hosts = hosts_of(environment)
    if len(hosts) * world.local_world_size != world.world_size:
        hosts = []
    missing = sorted(set(range(world.world_size)) - {report.rank for report in reports})
    seen = [f"{spans([report.rank for report in mine])} from {node}" for node, mine in nodes.items()]
    absent = [host for host in hosts if host not in nodes]
    on = f" on {listed(hosts)}" if hosts else ""
    words = f"expected {world.world_size} ranks{on}; saw {', '.join(seen)}"
    words += f", none from {listed(absent)}" if absent else f", not {spans(missing)}"
    unknown = [host for host in absent if not addresses_of(host)]
    fix = "their own lines on the screen say why they did not come; without any, the launcher did not start them, or "
    fix += "they need longer than timeout="
    if unknown:
        fix = f"{listed(unknown)} cannot be resolved from here (DNS, /etc/hosts); else {fix}"
    return Finding(check="ranks", status="fail", found=words, fix=fix, nodes=tuple(nodes))


# clocks -----------------------------------------------------------------------------------------------------


def clock(meeting: Meeting, leaders: list[int]) -> tuple[float, float] | None:
    """How many seconds this node's clock is ahead of rank zero's, and the error of that; None where it was
    not measured.

    Cristian's algorithm: rank zero's time was read between question and answer, so half the round trip bounds
    the error. The quickest of a few round trips counts. https://doi.org/10.1007/BF01784024
    """
    if meeting.rank == 0:
        deadline = time.monotonic() + CLOCKS
        for leader in leaders[1:]:
            with contextlib.suppress(TimeoutError):  # who does not ask fails elsewhere
                for ping in range(PINGS):
                    meeting.get(f"ping/{leader}/{ping}", min(STEP, deadline - time.monotonic()))
                    meeting.put(f"pong/{leader}/{ping}", time.time())
        return None
    trips = []
    for ping in range(PINGS):
        start = time.time()
        meeting.put(f"ping/{meeting.rank}/{ping}", True)
        theirs = meeting.get(f"pong/{meeting.rank}/{ping}", CLOCKS)
        end = time.time()
        trips.append((end - start, (start + end) / 2 - theirs))
    trip, ahead = min(trips)
    return ahead, trip / 2


def clocks(measured: Mapping[str, tuple[float, float]], first: str) -> list[Finding]:
    """The clocks against that of the node `first`."""
    values: dict[str, tuple[Status, str, str]] = {}
    for node, (ahead, error) in measured.items():
        surely = abs(ahead) - error
        if surely > SKEW_WARN:
            fix = "`timedatectl`: let chrony or ntpd set it; files seem to come from the future, and credentials expire early"
            words = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {first} (± {error * 1000:.1f} ms)"
            values[node] = ("fail" if surely > SKEW_FAIL else "warn"), words, fix
    if good := {node: values for node, values in measured.items() if abs(values[0]) - values[1] <= SKEW_WARN}:
        ahead, error = max(abs(ahead) for ahead, _ in good.values()), max(error for _, error in good.values())
        words = f"at most {ahead * 1000:.1f} ms from {first} (± {error * 1000:.1f} ms)"
        return [Finding(check="clock", found=words, nodes=tuple(good)), *by_value("clock", values)]
    return by_value("clock", values)


# one folder -------------------------------------------------------------------------------------------------


def shared_folder(meeting: Meeting, leaders: list[int], folder: Path, token: str) -> dict[str, Any]:
    """Write a file and rename it, then look for those of the other nodes; they are removed in any case."""
    first = folder / f".doctor-{token}-{meeting.rank}.partial"
    mine = first.with_suffix(".whole")
    problem = ""
    # rank zero removes those of all: one that was killed cannot
    others = (
        [folder / f".doctor-{token}-{rank}.whole" for rank in leaders if rank != 0]
        if meeting.rank == 0
        else []
    )
    with scratch(first, mine, *others):
        try:
            first.write_text(str(meeting.rank))
            first.rename(mine)
        except OSError as error:
            problem = error.strerror or str(error)
        meeting.wait_for("written", leaders, STEP)
        start = time.monotonic()
        missing = [rank for rank in leaders if rank != meeting.rank]
        while missing and time.monotonic() - start < SEEN:
            missing = [
                rank for rank in missing if not holds(folder / f".doctor-{token}-{rank}.whole", str(rank))
            ]
            time.sleep(0.02 if missing else 0)
        seconds = time.monotonic() - start
        meeting.wait_for("seen", leaders, SEEN + 1)
    return {"missing": missing, "problem": problem, "seconds": seconds}


def holds(path: Path, text: str) -> bool:
    """Whether the file is there and says `text`."""
    with contextlib.suppress(OSError):
        return path.read_text() == text
    return False


def one_folder(
    looked: Mapping[str, Mapping[str, Any]], names: Mapping[int, str], folder: str
) -> list[Finding]:
    """Whether all nodes see the same folder; `names` are the nodes of the ranks that looked."""
    values: dict[str, tuple[Status, str, str]] = {}
    fix = "checkpoints need one folder for all nodes: run_dir= on a file system that they share (NFS, Lustre), mounted alike"
    for node, result in looked.items():
        if result["problem"]:
            values[node] = "fail", f"{folder}: {result['problem']}", fix
        elif result["missing"]:
            others = listed([names[rank] for rank in result["missing"]])
            values[node] = "fail", f"{folder}: sees nothing of what {others} wrote there", fix
        else:
            slowest = max(result["seconds"] for result in looked.values())
            kind = file_system(Path(folder))
            values[node] = (
                "pass",
                f"{folder} ({kind}): new files are seen within {max(slowest, 0.01):.2f} s",
                "",
            )
    return by_value("shared folder", values)
