"""Look at the machines before a run does.

    python launch/commands/doctor.py                                   this machine
    srun --ntasks-per-node=1 python launch/commands/doctor.py          all nodes of a SLURM job
    torchrun --nproc_per_node=8 launch/commands/doctor.py              the ranks as a run will have them (also over several nodes)
        run_dir=/scratch/me/runs                              the folder to try (default: the current one)
        timeout=20                                            seconds to wait for the other ranks

Tells whether all ranks come, names, interfaces and the port are right, versions and code are equal, which GPU
each rank gets and who else is on it; shared memory, limits, CPUs, disk, one folder for all nodes, clocks, and
how fast neighbours exchange data against what the link should give: the ring of the nodes, not every pair.
One table, and the fix under whatever is not well. Where nodes cannot reach each other torchrun itself waits:
srun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand on each node, tells why. Exit codes: 0 pass
or warn; 1 something fails; 2 a mistake in the command.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.cli.config import (
    RANK_ZERO_GRACE_S,
    build,
    check_known,
    exit_with_mistake,
    keys_of,
    parse,
    read_line,
)
from launch.diagnostics import run_all
from launch.diagnostics.exchange import join
from launch.diagnostics.report import Finding, Report, nodes_of
from launch.diagnostics.table import show
from launch.diagnostics.temp_files import remove_all
from launch.runtime.store import UnreachableError, rendezvous_endpoint
from launch.runtime.world import World, find_world

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # what torch's sockets log, this command says in words
    "TORCH_NCCL_BLOCKING_WAIT": "1",  # a collective that hangs is to raise, not to end the process
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


@dataclass(kw_only=True)
class Own:
    """The keys of this command."""

    run_dir: str = "."
    timeout: float = 20.0


def main(words: list[str]) -> int:
    """Look; returns the exit code, the same on all ranks that met."""
    if "--help" in words or "-h" in words:
        print((__doc__ or "").strip())
        return 0
    start, environment, world = time.monotonic(), dict(os.environ), World()
    os.environ.update(QUIET)
    try:
        world = find_world(environment)
        own, point = read(words), rendezvous_endpoint(world, environment)
    except ValueError as error:
        exit_with_mistake(error, world.rank)
    folder = Path(own.run_dir)
    report = run_all.alone(world, environment, point, folder)
    title = "doctor: this machine (a SLURM job: srun --ntasks-per-node=1 python launch/commands/doctor.py)"
    if point is None:
        found = run_all.verdict([report], {}, world, environment, "")
        return show(title, found, [report.host], time.monotonic() - start)
    try:
        meeting = join(world, environment, point, own.timeout)
        said = meeting.gather("report", report.to_json(), own.timeout)
        reports = [Report.of_json(content) for content in said.values()]
        plan = meeting.tell("plan", run_all.plan(reports, folder) if reports else None, 3 * own.timeout)
        if world.rank not in plan["ranks"]:
            raise UnreachableError(
                f"it came too late, after rank zero had waited for {own.timeout:g} s; timeout={3 * own.timeout:g} waits longer"
            )
        meeting.ranks = plan["ranks"]
        results = meeting.gather("results", run_all.together(meeting, plan, report, point), run_all.LATER)
        code = 0
        if world.rank == 0:
            found = run_all.verdict(reports, results, world, environment, plan["folder"])
            nodes = list(nodes_of(reports))
            title = f"doctor: {len(nodes)} node(s), {len(reports)} rank(s), started by {world.launcher}"
            code = show(title, found, nodes, time.monotonic() - start)
            sys.stdout.flush()
        code = int(meeting.tell("code", code, 2 * run_all.patience(plan)))
        meeting.leave()
        return code
    except (
        UnreachableError,
        TimeoutError,
        RuntimeError,
        ImportError,
        OSError,
    ) as error:  # no store any more, or a broken torch
        return not_met(error, report, world, environment, start)


def not_met(error: Exception, report: Report, world: World, environment: dict[str, str], start: float) -> int:
    """Rank zero shows what it found alone; another says why it is alone, and leaves it time to. Exit code 1."""
    if isinstance(error, RuntimeError):
        if not type(error).__name__.startswith("Dist"):  # ours, not that of torch's store
            raise error
        error = UnreachableError("the store of the launcher or of rank zero has gone; see what they say")
    why, _, fix = str(error).partition("; ")
    if world.rank == 0:
        report.findings = [finding for finding in report.findings if finding.check != "port"]
        report.findings.append(Finding(check="port", status="fail", found=why, fix=fix))
        show(
            "doctor: rank zero, without the others",
            run_all.verdict([report], {}, world, environment, ""),
            [report.host],
            time.monotonic() - start,
        )
        return 1
    print(
        f"rankzero: rank {world.rank} on {report.host}: {why}{'; ' if fix else ''}{fix}",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(RANK_ZERO_GRACE_S)
    return 1


def read(words: list[str]) -> Own:
    """The keys of this command. Raises ValueError, in words."""
    known = {key.name: key for key in keys_of(Own)}
    line = read_line(words)
    check_known(line, known, "doctor")
    own: Own = build(Own, {name: parse(text, known[name]) for name, text in line.items()})
    if not 0 < own.timeout < 3600:
        raise ValueError(f"timeout={own.timeout:g} must be a number of seconds, above 0")
    return own


def end(number: int, _: FrameType | None) -> NoReturn:
    """End at once, whatever hangs, and leave no file."""
    remove_all()
    os._exit(128 + number)
