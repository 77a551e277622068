"""The heartbeats of all ranks, as rank zero reads them: when each last beat, and last made progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it

from launch.runtime.rendezvous import heartbeat_key

if TYPE_CHECKING:
    from launch.runtime.phase import Phase

FINISHED = "0 0 0 end"
"""the last heartbeat of a rank that has succeeded"""


def write_heartbeat(store: Store, rank: int, count: int, phase: Phase) -> None:
    """Beat for the `count`-th time: how often this rank has made progress, and where it is."""
    store.set(heartbeat_key(rank), f"{count} {phase.ticks} {phase.step} {phase.name}")


class RankStatus:
    """What was last read of a rank."""

    def __init__(self) -> None:
        self.count = self.ticks = ""
        self.step, self.phase = "0", "start"
        self.last_beat = self.last_progress = time.monotonic()


class Heartbeats:
    """What was last read of all ranks."""

    def __init__(self, world_size: int) -> None:
        self.keys = [heartbeat_key(rank) for rank in range(world_size)]
        self.statuses = [RankStatus() for _ in self.keys]

    def read(self, store: Store) -> None:
        """Read all heartbeats."""
        now = time.monotonic()
        for status, beat in zip(self.statuses, store.multi_get(self.keys), strict=True):
            count, ticks, status.step, status.phase = beat.decode().split(" ", 3)
            if count != status.count or count == "0":  # 0: not connected yet, or finished
                status.count, status.last_beat = count, now
            if ticks != status.ticks:
                status.ticks, status.last_progress = ticks, now

    def reset_after_suspend(self) -> None:
        """It was this process that was suspended: nothing follows for the others."""
        for status in self.statuses:
            status.last_beat = time.monotonic()

    def silent_ranks(self, seconds: float) -> list[int]:
        """The ranks without a heartbeat for so long."""
        now = time.monotonic()
        return [rank for rank, status in enumerate(self.statuses) if now - status.last_beat > seconds]

    def seconds_without_progress(self) -> float:
        """Seconds since any rank has made progress."""
        return time.monotonic() - max((status.last_progress for status in self.statuses), default=0.0)
