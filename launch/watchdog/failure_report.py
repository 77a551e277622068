"""The failure report of a run: what the first rank that failed says of it, on the screen and in failure.json.

Imports no torch: a run that starts again reads the report of the attempt before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

FAILURE_FILE, PREVIOUS_FAILURE_FILE = "failure.json", "failure.former.json"
COMMON = ("kind", "rank", "host", "device", "step", "phase", "time", "message")
"""what each report says; the other fields belong to some kinds, and are written where they are not None"""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Why a run has failed, and where the rank was that found it; travels and is kept as JSON."""

    kind: str
    """exception; words (the message says it all); lost (ranks died); hang; memory (all ranks restart)"""
    message: str
    rank: int | None = None
    """the rank that failed or found it; None: all ranks alike"""
    host: str = ""
    device: str = "cpu"
    step: int | None = None
    """the optimizer step, from 1; None: before the first"""
    phase: str = ""
    time: float = 0.0
    """seconds since the epoch"""
    error: str | None = None
    """the class of the exception"""
    frames: list[str] | None = None
    """of the traceback, from the user's own code on"""
    traceback: list[str] | None = None
    batch: str | None = None
    """shapes of the micro-batch that was in work"""
    memory: str | None = None
    hint: str | None = None
    lost: list[int] | None = None
    """the ranks that died"""
    ranks: list[str] | None = None
    """of a hang, in lines: which ranks are where"""
    groups: dict[str, list[int]] | None = None
    """of a hang: the ranks by step and phase"""
    stacks: dict[str, str] | None = None
    """of a hang: a whole stack of each place"""
    flight_recorder: Any = None
    """of a hang under NCCL: the collectives that have not ended"""
    micro_batch_size: int | None = None
    """with which the ranks restart"""
    repeated: int | None = None
    """how many attempts in a row have failed like this"""

    @property
    def restarts(self) -> bool:
        """Whether all ranks restart after this, instead of ending."""
        return self.kind == "memory"

    def to_dict(self) -> dict[str, Any]:
        """The content of failure.json."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if name in COMMON or value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FailureReport:
        """The report of a failure.json, from an older version too: what it does not say has its default."""
        known = {item.name for item in fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        return cls(**({"kind": "", "message": ""} | given))

    def to_json(self) -> str:
        """As text, for the store."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> FailureReport:
        """From what `to_json` gave, or a failure.json. Raises ValueError."""
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        return cls.from_dict(content)

    def same_failure(self, other: FailureReport) -> bool:
        """Whether both failed in the same step with the same message."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("kind", "step", "error", "message")
        )


# the file ---------------------------------------------------------------------------------------------------


def read_failure(path: Path) -> FailureReport | None:
    """The report in a failure.json; None if there is none, or it cannot be read."""
    try:
        return FailureReport.from_json(path.read_text())
    except (OSError, ValueError):
        return None


def write_once(report: FailureReport, run_dir: Path) -> bool:
    """Write failure.json if there is none. Returns whether no other rank was first.

    It counts how many attempts in a row have failed like this: `run_dir.refuse_to_loop` reads it. A disk that
    cannot be written to hides no failure.
    """
    previous = read_failure(run_dir / PREVIOUS_FAILURE_FILE)
    again = previous is not None and report.kind == "exception" and report.same_failure(previous)
    report = replace(report, repeated=(previous.repeated or 1) + 1 if previous and again else 1)
    try:
        with (run_dir / FAILURE_FILE).open("x") as file:
            json.dump(report.to_dict(), file, indent=1)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


# the screen -------------------------------------------------------------------------------------------------


def render(report: FailureReport, run_dir: Path | None) -> str:
    """The lines for the screen."""
    lines = [f"rankzero: {headline(report)}"]
    for frame in report.frames or ():
        lines += [f"  {line}" for line in frame.splitlines()]
    for name in ("batch", "memory", "hint"):
        if value := getattr(report, name):
            lines.append(f"  {name:<8}{value}")
    lines += [f"  {line}" for line in report.ranks or ()]
    if run_dir is not None:
        lines.append(f"  more in {run_dir / FAILURE_FILE}")
    return "\n".join(lines)


def headline(report: FailureReport) -> str:
    """The first line: which rank, where, what."""
    if report.kind != "exception":
        return report.message
    device = "" if report.device == "cpu" else f" ({report.device})"
    step = "" if report.step is None else f", step {report.step}"
    where = f"rank {report.rank} on {report.host}{device}{step}, {report.phase}"
    return f"{where}: {report.error}: {report.message}"


def write_torchelastic_error(report: FailureReport) -> None:
    """Let torchrun's own summary, which follows ours, name the cause too.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.ErrorHandler`.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": render(report, None), "timestamp": str(int(report.time))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": headline(report), "extraInfo": extra}}))
