"""The consensus of all ranks: what one rank requests, all ranks do after the same step.

They save by the clock of rank zero, and stop at a signal that one node got. A decision by each rank's own
clock would let some ranks save while others step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from launch.runtime.world import World

PERIOD_S = 0.05
"""seconds between two exchanges, where steps are shorter"""
MAX_CALLS_TO_SKIP = 31
"""steps without an exchange: should they become slow all at once, a request waits for no more"""


class Consensus:
    """An all-reduce of a few flags, on the host, whose result is read at the next call: nobody waits for it.

    The tensor is [calls_to_skip, a flag for each request], uint8, reduced by MAX: a flag is set if any rank
    has set it. Rank zero alone puts a number into the first slot, the others 0, so that MAX broadcasts it:
    how many calls all ranks let go by before the next exchange. They must agree on it, and a second
    collective would cost as much as the first.

    A single process has nobody to ask.
    """

    def __init__(self, world: World, requests: Collection[str], period: float = PERIOD_S) -> None:
        self.world, self.period = world, period
        self.names = list(requests)
        self.in_flight: tuple[Tensor, dist.Work] | None = None
        self.calls_to_skip = self.calls_left = 0
        """calls without an exchange after the last one, and how many of them are still to come"""
        self.clock = time.perf_counter()

    def exchange(self, requests: Collection[str], seldom: bool = False) -> set[str]:
        """Send this rank's requests; returns those that any rank had sent in the exchange before. Collective:
        all ranks call it at the same places.

        With `seldom`, calls that come faster than `period` go by without an exchange, as many as rank zero
        has said: beside a step of a millisecond an all-reduce is not cheap.
        """
        if self.world.world_size == 1:
            return set(requests)
        received = self.close()
        if seldom and self.calls_left:
            self.calls_left -= 1
            return received
        calls_to_skip = self.choose_calls_to_skip() if seldom and self.world.rank == 0 else 0
        flags = torch.tensor([calls_to_skip, *(name in requests for name in self.names)], dtype=torch.uint8)
        self.in_flight = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        return received

    def choose_calls_to_skip(self) -> int:
        """On rank zero: how many calls make up a period, at most about twice as many as last time."""
        last, self.clock = self.clock, time.perf_counter()
        seconds_per_call = (self.clock - last) / (1 + self.calls_to_skip)
        in_period = math.ceil(self.period / seconds_per_call) - 1
        return max(min(in_period, 2 * self.calls_to_skip + 1, MAX_CALLS_TO_SKIP), 0)

    def close(self) -> set[str]:
        """The result of the last exchange, without a new one; waits for it on all ranks."""
        if self.in_flight is None:
            return set()
        (flags, work), self.in_flight = self.in_flight, None
        work.wait()
        self.calls_to_skip, *set_by_any = flags.tolist()
        self.calls_left = self.calls_to_skip
        return {name for name, is_set in zip(self.names, set_by_any, strict=True) if is_set}
