"""The one table that rank zero prints."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence

from launch.diagnostics.report import NAMED, Finding, Status, listed

ORDER = (
    *("ranks", "names", "network", "port", "versions", "software", "environment"),
    *("GPUs", "gpu", "GPUs in use", "cpus", "cpu", "shared memory", "open files", "locked memory"),
    *("disk", "shared folder", "extensions", "clock", "bandwidth", "within a node"),
)
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
WIDTH = 120
"""columns where the screen is a file or a pipe (srun), unless COLUMNS says otherwise"""


def rows(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """One row for all nodes that agree and, where all is well, one row a check; `nodes` gives their order."""
    merged: list[Finding] = []
    places = {check: place for place, check in enumerate(ORDER)}
    checks = dict.fromkeys(finding.check for finding in findings)
    for check in sorted(checks, key=lambda check: places.get(check, len(places))):
        values: dict[tuple[Status, str, str], list[str]] = {}
        for finding in findings:
            if finding.check == check:
                values.setdefault((finding.status, finding.found, finding.fix), []).extend(finding.nodes)
        good = {found: who for (status, found, _), who in values.items() if status == "pass"}
        if len(good) > 1:
            words = [f"{listed(ordered(who, nodes))}: {found}" for found, who in good.items()]
            more = f"; and {len(words) - NAMED} more" if len(words) > NAMED else ""
            values = {value: who for value, who in values.items() if value[0] != "pass"}
            values["pass", "; ".join(words[:NAMED]) + more, ""] = [
                node for who in good.values() for node in who
            ]
        bad_last = sorted(values.items(), key=lambda item: ("pass", "warn", "fail").index(item[0][0]))
        merged += [
            Finding(check=check, status=status, found=found, fix=fix, nodes=tuple(ordered(who, nodes)))
            for (status, found, fix), who in bad_last
        ]
    return merged


def ordered(names: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Each of `names` once, in the order of `nodes`."""
    return [node for node in nodes if node in names]


def lines(
    shown: Sequence[Finding], nodes: Sequence[str], width: int
) -> Iterator[tuple[Finding | None, bool, str]]:
    """The table, line by line: of which finding a line is (None: the header), whether it belongs to the fix,
    and its text.

    Wrapped between words only: a path or command in a fix must be whole, to be copied. Rich would cut it.
    """
    who = {row: names(row, nodes) for row in shown}
    first = max(len(row.check) for row in shown) + 2
    third = min(max(len(words) for words in who.values()), 20) + 2 if len(nodes) > 1 else 0
    rest = max(width - first - 6 - third, 30)
    yield None, False, f"{'check':{first + 6}}{'nodes'[:third]:{third}}found"
    for row in shown:
        left = wrap(who[row], third - 2) if third else []
        found, fix = wrap(row.found, rest), wrap(f"fix: {row.fix}", rest) if row.fix else []
        for n in range(max(len(found) + len(fix), len(left))):
            head = f"{row.check:{first}}{row.status:6}" if n == 0 else " " * (first + 6)
            text = (found + fix)[n] if n < len(found) + len(fix) else ""
            yield row, n >= len(found), f"{head}{left[n] if n < len(left) else '':{third}}{text}".rstrip()


def names(row: Finding, nodes: Sequence[str]) -> str:
    """The nodes of a row in words."""
    return f"all {len(nodes)}" if len(row.nodes) == len(nodes) > NAMED else listed(row.nodes, "")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, or of one word."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def show(title: str, findings: Sequence[Finding], nodes: Sequence[str], seconds: float) -> int:
    """Print the table; returns the exit code: 1 if something fails."""
    from rich.console import Console
    from rich.text import Text

    screen = Console(highlight=False)
    shown = rows(findings, nodes)
    width = screen.width if screen.is_terminal or "COLUMNS" in os.environ else WIDTH
    screen.print(Text(title, style="bold"), soft_wrap=True)
    for row, is_fix, line in lines(shown, nodes, width):
        text = Text(line, style="dim" if row is None else "bold" if is_fix else "")
        if row and line.startswith(row.check):
            place = line.index(row.status, len(row.check))
            text.stylize(COLOURS[row.status], place, place + len(row.status))
        screen.print(text, soft_wrap=True)
    count = {status: sum(row.status == status for row in shown) for status in COLOURS}
    screen.print(f"{count['pass']} pass, {count['warn']} warn, {count['fail']} fail, in {seconds:.1f} s")
    return int(count["fail"] > 0)
