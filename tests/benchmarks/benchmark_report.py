"""What the benchmarks share: turns, paired ratios, and rows that are printed and kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.runtime.versions import git_revision, versions

PEERS = ("lightning", "transformers")


def interleave(theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> list[tuple[Any, Any]]:
    """Pairs (theirs, ours) of neighbours in time: A B B A, so that a drift of the machine favours neither."""
    pairs = []
    for _ in range(rounds):
        a, b, c, d = theirs(), ours(), ours(), theirs()
        pairs += [(a, b), (d, c)]
    return pairs


def ratios(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The median of ours over theirs, pair by pair, and its quartiles."""
    found = [ours / theirs for theirs, ours in pairs]
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"ratio": statistics.median(found), "low": low, "high": high}


class Report:
    """A table on the screen, row by row; with `path`, the rows as JSON too, with machine and versions."""

    def __init__(self, path: str | None, columns: Mapping[str, str]) -> None:
        """`columns`: name to format, as of a format string (`<12`, `>10.3f`)."""
        self.path, self.columns, self.rows = path, columns, list[dict[str, Any]]()
        made_with = versions() | {name: version(name) for name in PEERS if find_spec(name)}
        said = "  ".join(f"{name} {made_with[name]}" for name in ("rankzero", "torch", "python"))
        print(
            f"{said}  {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {os.cpu_count()} cores,"
            f" load {os.getloadavg()[0]:.1f}"
        )
        self.facts = {
            "command": " ".join(sys.argv),
            "machine": machine(),
            "versions": made_with,
            "git": git_revision(),
        }
        print(" ".join(f"{name:{plain(form)}}" for name, form in columns.items()), flush=True)

    def row(self, **values: Any) -> None:
        """One line; a value that is missing or None is left blank, a text takes the place of a number."""
        cells = []
        for name, form in self.columns.items():
            value = values.get(name)
            numeric = isinstance(value, int | float)
            cells.append(f"{'' if value is None else value:{form if numeric else plain(form)}}")
        print(" ".join(cells).rstrip(), flush=True)
        self.rows.append(values)
        if self.path:
            Path(self.path).write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def plain(form: str) -> str:
    """The alignment and width of a format."""
    return form.partition(".")[0].rstrip("def,")


def machine() -> dict[str, Any]:
    """Of what kind it is, not which one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
    }
