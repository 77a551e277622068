"""What a strategy has to know of the ranks of a run (rank, world size, device)."""

from __future__ import annotations

from typing import Protocol


class WorldInfo(Protocol):
    """One rank among those of a run (`launch.runtime.world.World` is one)."""

    @property
    def rank(self) -> int:
        """0 to `world_size` - 1."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""

    @property
    def device(self) -> str:
        """Of this rank: `cpu` or `cuda:N`."""
