"""The table of findings that rank zero prints. Imports no torch."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launch.diagnostics.findings import MAX_NAMED, Finding, Outcome, first_names

CHECK_ORDER = (
    "ranks",
    "hostname",
    "network",
    "port",
    "versions",
    "environment",
    "GPUs",
    "GPUs in use",
    "CPUs",
    "shared memory",
    "open files",
    "locked memory",
    "disk",
    "shared storage",
    "extensions",
    "clock",
    "bandwidth",
    "intra-node",
)
COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}
STATUS_ORDER = tuple(COLORS)
STATUS_WIDTH = 6
NODES_WIDTH = 20
"""columns at most for the nodes of a row"""
DEFAULT_WIDTH = 120
"""columns where the output is a file or a pipe (srun), unless COLUMNS says otherwise"""


class Line(NamedTuple):
    """A line of the table."""

    finding: Finding | None
    """None: the header"""
    is_fix: bool
    text: str


def merge_rows(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """One row for all nodes that agree and, where all pass, one row a check; `nodes` gives their order."""
    rank_of_check = {check: index for index, check in enumerate(CHECK_ORDER)}
    checks = dict.fromkeys(finding.check for finding in findings)
    rows: list[Finding] = []
    for check in sorted(checks, key=lambda check: rank_of_check.get(check, len(rank_of_check))):
        rows += rows_of_check(check, [finding for finding in findings if finding.check == check], nodes)
    return rows


def rows_of_check(check: str, findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """The rows of one check: what passes first, what fails last."""
    nodes_of: dict[Outcome, list[str]] = {}
    for finding in findings:
        outcome = Outcome(finding.status, finding.message, finding.fix)
        nodes_of.setdefault(outcome, []).extend(finding.nodes)
    passing = {outcome: names for outcome, names in nodes_of.items() if outcome.status == "pass"}
    if len(passing) > 1:
        parts = [f"{first_names(in_order(names, nodes))}: {o.message}" for o, names in passing.items()]
        more = f"; and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
        nodes_of = {outcome: names for outcome, names in nodes_of.items() if outcome.status != "pass"}
        merged = Outcome("pass", "; ".join(parts[:MAX_NAMED]) + more)
        nodes_of[merged] = [node for names in passing.values() for node in names]
    return [
        Finding(
            check=check,
            status=outcome.status,
            message=outcome.message,
            fix=outcome.fix,
            nodes=tuple(in_order(names, nodes)),
        )
        for outcome, names in sorted(nodes_of.items(), key=lambda item: STATUS_ORDER.index(item[0].status))
    ]


def in_order(names: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Each of `names` once, in the order of `nodes`."""
    return [node for node in nodes if node in names]


def format_lines(rows: Sequence[Finding], nodes: Sequence[str], width: int) -> Iterator[Line]:
    """The table, line by line.

    Wrapped between words only: a path or command in a fix must stay whole, to be copied. Rich would cut it.
    """
    node_names = {row: format_nodes(row, nodes) for row in rows}
    check_width = max(len(row.check) for row in rows) + 2
    nodes_width = min(max(map(len, node_names.values())), NODES_WIDTH) + 2 if len(nodes) > 1 else 0
    text_width = max(width - check_width - STATUS_WIDTH - nodes_width, 30)
    blank = " " * (check_width + STATUS_WIDTH)
    yield Line(None, False, f"{'check':{len(blank)}}{'nodes'[:nodes_width]:{nodes_width}}finding")
    for row in rows:
        names = wrap(node_names[row], nodes_width - 2) if nodes_width else []
        message = wrap(row.message, text_width)
        texts = message + (wrap(f"fix: {row.fix}", text_width) if row.fix else [])
        for n in range(max(len(texts), len(names))):
            head = f"{row.check:{check_width}}{row.status:{STATUS_WIDTH}}" if n == 0 else blank
            name = names[n] if n < len(names) else ""
            text = texts[n] if n < len(texts) else ""
            yield Line(row, n >= len(message), f"{head}{name:{nodes_width}}{text}".rstrip())


def format_nodes(row: Finding, nodes: Sequence[str]) -> str:
    """The nodes of a row for its cell."""
    if len(row.nodes) == len(nodes) > MAX_NAMED:
        return f"all {len(nodes)}"
    return first_names(row.nodes, "")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, or of one word."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def print_findings(title: str, findings: Sequence[Finding], nodes: Sequence[str], seconds: float) -> int:
    """Print the table; returns the exit code: 1 if a check fails."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    rows = merge_rows(findings, nodes)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else DEFAULT_WIDTH
    console.print(Text(title, style="bold"), soft_wrap=True)
    for row, is_fix, line in format_lines(rows, nodes, width):
        text = Text(line, style="dim" if row is None else "bold" if is_fix else "")
        if row and line.startswith(row.check):
            start = line.index(row.status, len(row.check))
            text.stylize(COLORS[row.status], start, start + len(row.status))
        console.print(text, soft_wrap=True)
    count = {status: sum(row.status == status for row in rows) for status in COLORS}
    console.print(f"{count['pass']} pass, {count['warn']} warn, {count['fail']} fail, in {seconds:.1f} s")
    return int(count["fail"] > 0)
