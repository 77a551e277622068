"""What one rank wishes, all ranks do at the same step: save by the clock of rank zero, stop at a signal that one node got."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from launch.world import World


class Agreement:
    """An all-reduce of a few flags at each step, on the host, whose outcome is read one step later: nobody waits for it.

    A decision by each rank's own clock would let some ranks save while others step. A process by itself need not ask.
    """

    def __init__(self, world: World, wishes: Collection[str]) -> None:
        self.alone = world.world_size == 1
        self.names = list(wishes)
        self.asked: tuple[Tensor, dist.Work | None] | None = None

    def exchange(self, wishes: Collection[str]) -> set[str]:
        """Say this rank's wishes; hear what any rank wished a step ago. All ranks call it at each step."""
        if self.alone:
            return set(wishes)
        heard = self.close()
        flags = torch.tensor([name in wishes for name in self.names], dtype=torch.uint8)
        self.asked = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        return heard

    def close(self) -> set[str]:
        """Hear the last answer, without a new question."""
        if self.asked is None:
            return set()
        flags, work = self.asked
        self.asked = None
        if work is not None:
            work.wait()
        return {name for name, flag in zip(self.names, flags.tolist(), strict=True) if flag}
