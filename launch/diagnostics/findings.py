"""What a check concludes, and how one is run so that it always ends. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launch.runtime.store import within
from launch.runtime.wording import join_names

Status = Literal["pass", "warn", "fail"]
MAX_NAMED = 4
"""nodes, or different values, that are named one by one before the rest is only counted"""
TIMEOUT_FIXES = {
    "disk": "the file system does not answer: look at its server and mount (`df`, `dmesg`), or choose "
    "another run_dir=",
    "GPUs": "the driver does not answer: `nvidia-smi` and `dmesg | grep -i xid` show more; reboot the node "
    "or leave it out",
}
"""the fix for a check that hangs, by its name"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    status: Status = "pass"
    message: str
    fix: str = ""
    """what to do; empty where nothing is to be done"""
    nodes: tuple[str, ...] = ()
    """the nodes that it holds for"""


class Outcome(NamedTuple):
    """The result of a check for one node, before equal ones are merged into a finding."""

    status: Status
    message: str
    fix: str = ""


def merge_equal(check: str, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """One finding for each different outcome, with all nodes that have it; `outcomes` are by node."""
    nodes: dict[Outcome, list[str]] = {}
    for node, outcome in outcomes.items():
        nodes.setdefault(outcome, []).append(node)
    return [
        Finding(
            check=check, status=outcome.status, message=outcome.message, fix=outcome.fix, nodes=tuple(names)
        )
        for outcome, names in nodes.items()
    ]


def run_check(check: str, timeout_s: float, function: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check. One that raises or hangs is itself a finding, and does not stop the others."""
    try:
        return within(timeout_s, lambda: list(function()))
    except TimeoutError as error:
        fix = TIMEOUT_FIXES.get(check, "look at the node: it hangs there")
        return [Finding(check=check, status="fail", message=str(error), fix=fix)]
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [Finding(check=check, status="fail", message=message)]


def first_names(names: Sequence[str], noun: str = "nodes") -> str:
    """The first MAX_NAMED names for a message, and how many more."""
    return join_names(names, MAX_NAMED, noun)
