"""How a global batch is cut into micro-batches, over ranks and gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut: batch_size = micro_batch_size x accumulation x world_size."""

    micro_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int

    @property
    def batch_size(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def micro_batch_index(self, micro_step: int) -> int:
        """Which micro-batch of the global batch this rank computes in its `micro_step`."""
        return micro_step * self.world_size + self.rank
