"""What one rank wishes, all ranks do at the same step: save by the clock of rank zero, stop at a signal that
one node got.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from launch.runtime.world import World

PERIOD = 0.05
"""seconds between two questions, where steps are shorter"""
MOST = 31
"""steps that may go by without a question: should they become slow all at once, a wish waits for no more"""


class Consensus:
    """An all-reduce of a few flags, on the host, whose outcome is read at the next call: nobody waits for it.

    A decision by each rank's own clock would let some ranks save while others step. A process by itself need
    not ask.
    """

    def __init__(self, world: World, requests: Collection[str], period: float = PERIOD) -> None:
        self.world, self.period = world, period
        self.names = list(requests)
        self.asked: tuple[Tensor, dist.Work] | None = None
        self.pause = self.left = 0
        """calls between the last question and the next, and how many of them are still to come"""
        self.clock = time.perf_counter()

    def exchange(self, requests: Collection[str], seldom: bool = False) -> set[str]:
        """Say this rank's wishes; hear what any rank wished when last asked. All ranks call it at the same
        places.

        With `seldom`, calls that come faster than `period` go by without a question, as many as rank zero has
        said: beside a step of a millisecond an all-reduce is not cheap.
        """
        if self.world.world_size == 1:
            return set(requests)
        heard = self.close()
        if seldom and self.left:
            self.left -= 1
            return heard
        pause = self.calls_to_skip() if seldom and self.world.rank == 0 else 0
        flags = torch.tensor([pause, *(name in requests for name in self.names)], dtype=torch.uint8)
        self.asked = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        return heard

    def calls_to_skip(self) -> int:
        """How many calls may go by after this one; no more than about twice as many as last time."""
        last, self.clock = self.clock, time.perf_counter()
        call = (self.clock - last) / (1 + self.pause)
        return max(min(math.ceil(self.period / call) - 1, 2 * self.pause + 1, MOST), 0)

    def close(self) -> set[str]:
        """Hear the last answer, without a new question."""
        if self.asked is None:
            return set()
        (flags, work), self.asked = self.asked, None
        work.wait()
        self.pause, *wished = flags.tolist()
        self.left = self.pause
        return {name for name, wish in zip(self.names, wished, strict=True) if wish}
