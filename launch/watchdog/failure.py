"""How a run fails: the rank that failed first says so, once for all; the others, who merely lost it, look for the cause."""

from __future__ import annotations

from typing import NoReturn

import torch.distributed as dist

from launch.checkpoint.writer import NotSaved
from launch.watchdog import failure_report as verdicts
from launch.watchdog.failure_report import Verdict
from launch.watchdog.nonfinite import NonFinite
from launch.watchdog.watchdog import Watch

WORDS = (NonFinite, NotSaved)
"""errors that are verdicts in words, the same on all ranks: no line of code would add to them"""


def fail(error: Exception, watch: Watch, verdict: Verdict | None = None) -> NoReturn:
    """End all ranks with the verdict on `error`, which is told once; exit code 1. Another `verdict` may let them begin again."""
    if verdict is not None:
        watch.failed(verdict, lost_a_peer=False)
    verdict = verdicts.of_exception(error, watch.world, watch.place)
    if isinstance(error, WORDS):
        verdict |= {"kind": "words", "rank": None, "frames": [], "batch": "", "memory": ""}
    watch.failed(verdict, lost_peer(error))


def lost_peer(error: Exception) -> bool:
    """Whether the error says only that another rank is gone."""
    words = str(error)
    return isinstance(error, dist.DistNetworkError | dist.DistBackendError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "Connection closed by peer" in words)
    )
