"""What rank zero has seen of the others: when each last gave a sign of life, and when it last moved on."""

from __future__ import annotations

import time

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it


class RankStatus:
    """The last that was seen of a rank."""

    def __init__(self) -> None:
        self.count = self.ticks = ""
        self.step, self.phase = "0", "start"
        self.lived = self.moved = time.monotonic()


class Heartbeats:
    """What has been seen of all ranks."""

    def __init__(self, world_size: int) -> None:
        self.keys = [f"beat/{rank}" for rank in range(world_size)]
        self.seen = [RankStatus() for _ in self.keys]

    def look(self, store: Store) -> None:
        """Read all heartbeats."""
        now = time.monotonic()
        for seen, beat in zip(self.seen, store.multi_get(self.keys), strict=True):
            count, ticks, seen.step, seen.phase = beat.decode().split(" ", 3)
            if count != seen.count or count == "0":  # 0: not connected yet, or at its good end
                seen.count, seen.lived = count, now
            if ticks != seen.ticks:
                seen.ticks, seen.moved = ticks, now

    def reset_after_suspend(self) -> None:
        """It was this process that slept: nothing follows for the others."""
        for seen in self.seen:
            seen.lived = time.monotonic()

    def silent_for(self, seconds: float) -> list[int]:
        """The ranks without a heartbeat for so long."""
        now = time.monotonic()
        return [rank for rank, seen in enumerate(self.seen) if now - seen.lived > seconds]

    def still_for(self) -> float:
        """Seconds since any rank has moved."""
        return time.monotonic() - max((seen.moved for seen in self.seen), default=0.0)
