"""All checks of `rankzero doctor`, on this machine or on all ranks together, and their exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.cli.exits import RANK_ZERO_GRACE_S
from launch.diagnostics.exchange import connect
from launch.diagnostics.findings import Finding
from launch.diagnostics.findings_table import print_findings
from launch.diagnostics.rank_report import RankReport, group_by_node
from launch.diagnostics.run_all import (
    RESULTS_GRACE_S,
    Endpoint,
    JointPlan,
    all_findings,
    make_plan,
    run_joint_checks,
    run_local_checks,
)
from launch.diagnostics.temp_files import remove_all
from launch.runtime.store import UnreachableError
from launch.runtime.world import World

LIBRARY_SETTINGS = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # what torch's sockets log, this command reports
    "TORCH_NCCL_BLOCKING_WAIT": "1",  # a collective that hangs must raise, not end the process
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
PLAN_TIMEOUTS = 3
"""how many times the timeout the other ranks wait for rank zero's plan: it may itself wait for a late rank"""


def check_ranks(
    world: World,
    environment: dict[str, str],
    endpoint: Endpoint | None,
    run_dir: Path,
    timeout_s: float,
) -> int:
    """Run all checks, and print the findings on rank zero; returns the exit code, the same on all ranks that
    joined.

    `environment` is that of the launcher; `endpoint` is where the ranks meet, None for a process by itself. A
    rank waits `timeout_s` for the others.
    """
    start = time.monotonic()
    os.environ.update(LIBRARY_SETTINGS)
    report = run_local_checks(world, environment, endpoint, run_dir)
    if endpoint is None:
        title = "doctor: this machine (all nodes: srun --ntasks-per-node=1 rankzero doctor)"
        findings = all_findings([report], {}, world, environment, "")
        return print_findings(title, findings, [report.host], time.monotonic() - start)
    try:
        return check_together(world, environment, endpoint, run_dir, timeout_s, report, start)
    except RuntimeError as error:
        if not type(error).__name__.startswith("Dist"):  # ours, not that of torch's store
            raise
        lost = UnreachableError("the store of the launcher or of rank zero is gone; see what they print")
        return finish_alone(lost, report, world, environment, start)
    except (UnreachableError, TimeoutError, ImportError, OSError) as error:  # ImportError: a broken torch
        return finish_alone(error, report, world, environment, start)


def check_together(
    world: World,
    environment: dict[str, str],
    endpoint: Endpoint,
    run_dir: Path,
    timeout_s: float,
    report: RankReport,
    start: float,
) -> int:
    """Join the other ranks, and run the joint checks. Raises UnreachableError or TimeoutError."""
    exchange = connect(world, environment, endpoint, timeout_s)
    reports = list(exchange.gather("report", report, timeout_s).values())
    plan = exchange.broadcast(
        "plan", make_plan(reports, run_dir) if reports else None, JointPlan, PLAN_TIMEOUTS * timeout_s
    )
    if world.rank not in plan.ranks:
        raise UnreachableError(
            f"it joined too late, after rank zero had waited for {timeout_s:g} s; "
            f"timeout={3 * timeout_s:g} waits longer"
        )
    exchange.ranks = plan.ranks
    joint = run_joint_checks(exchange, plan, report, endpoint)
    results = exchange.gather("results", joint, RESULTS_GRACE_S)
    code = None
    if world.rank == 0:
        findings = all_findings(reports, results, world, environment, plan.directory)
        nodes = list(group_by_node(reports))
        title = f"doctor: {len(nodes)} node(s), {len(reports)} rank(s), started by {world.launcher}"
        code = print_findings(title, findings, nodes, time.monotonic() - start)
        sys.stdout.flush()
    code = exchange.broadcast("code", code, int, 2 * plan.timeout_s)
    exchange.finish()
    return code


def finish_alone(
    error: Exception, report: RankReport, world: World, environment: dict[str, str], start: float
) -> int:
    """Without the other ranks: rank zero prints what it found by itself, another one why it is alone, and
    gives rank zero time to print. Returns the exit code 1.
    """
    reason, _, fix = str(error).partition("; ")
    if world.rank == 0:
        report.findings = [finding for finding in report.findings if finding.check != "port"]
        report.findings.append(Finding(check="port", status="fail", message=reason, fix=fix))
        findings = all_findings([report], {}, world, environment, "")
        title = "doctor: rank zero, without the others"
        print_findings(title, findings, [report.host], time.monotonic() - start)
        return 1
    message = f"rank {world.rank} on {report.host}: {reason}{'; ' if fix else ''}{fix}"
    print(f"rankzero: {message}", file=sys.stderr, flush=True)
    time.sleep(RANK_ZERO_GRACE_S)
    return 1


def end_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end this process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def end(number: int, _: FrameType | None) -> NoReturn:
    """End at once, whatever hangs, and leave no file."""
    remove_all()
    os._exit(128 + number)
