"""How a run fails: the rank that failed first says so, once for all; the others, who merely lost it, look for
the cause.
"""

from __future__ import annotations

from typing import NoReturn

import torch.distributed as dist

from launch.checkpoint.writer import SaveError
from launch.watchdog import failure_report
from launch.watchdog.failure_report import FailureReport
from launch.watchdog.nonfinite import NonFinite
from launch.watchdog.watchdog import Watchdog

WORDS = (NonFinite, SaveError)
"""errors that are verdicts in words, the same on all ranks: no line of code would add to them"""


def fail(error: Exception, watchdog: Watchdog, verdict: FailureReport | None = None) -> NoReturn:
    """End all ranks with the verdict on `error`, which is told once; exit code 1. Another `verdict` may let
    them begin again.
    """
    if verdict is not None:
        watchdog.failed(verdict, lost_a_peer=False)
    verdict = failure_report.from_exception(error, watchdog.world, watchdog.phase)
    if isinstance(error, WORDS):
        verdict |= {"kind": "words", "rank": None, "frames": [], "batch": "", "memory": ""}
    watchdog.failed(verdict, lost_peer(error))


def lost_peer(error: Exception) -> bool:
    """Whether the error says only that another rank is gone."""
    words = str(error)
    return isinstance(error, dist.DistNetworkError | dist.DistBackendError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "Connection closed by peer" in words)
    )
