"""The ranks meet in a torch store and tell each other plain data. Every wait has an end; nothing here is a
collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.runtime.store import check_own, open_store, reach
from launch.runtime.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it, its stubs do not

LEAVE = 5.0
"""seconds that rank zero, who may serve the store, waits for the others to have read the verdict"""


class Meeting:
    """What the ranks of one doctor tell each other. `ranks` are those who came: all that are expected, until
    rank zero knows.
    """

    def __init__(self, store: Store, rank: int, ranks: list[int]) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks

    def put(self, key: str, value: Any) -> None:
        """Say something once."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str, seconds: float) -> Any:
        """What somebody says under `key`. Raises TimeoutError."""
        import torch.distributed as dist

        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except dist.DistStoreError:
            raise TimeoutError(
                f"no word of the others ({key}) within {seconds:.0f} s; see what rank zero says"
            ) from None
        return json.loads(self.store.get(key))

    def gather(self, name: str, value: Any, seconds: float) -> dict[int, Any]:
        """On rank zero, what the ranks say, without those who do not within `seconds`; nothing on the others."""
        self.put(f"{name}/{self.rank}", value)
        if self.rank > 0:
            return {}
        deadline, said = time.monotonic() + seconds, {}
        for rank in self.ranks:
            try:
                said[rank] = self.get(f"{name}/{rank}", deadline - time.monotonic())
            except TimeoutError:
                continue
        return said

    def tell(self, name: str, value: Any, seconds: float) -> Any:
        """Rank zero's `value`, on every rank. Raises TimeoutError."""
        if self.rank == 0:
            self.put(name, value)
            return value
        return self.get(name, seconds)

    def wait_for(self, name: str, ranks: list[int], seconds: float) -> bool:
        """Wait until all of `ranks` have come to the point `name`, at most so long; whether they have."""
        if self.store.add(f"{name}/count", 1) == len(ranks):
            self.put(f"{name}/all", True)
        try:
            return bool(self.get(f"{name}/all", seconds))
        except TimeoutError:
            return False

    def leave(self) -> None:
        """The last word; rank zero, who may serve the store, stays until all have read what was told."""
        if self.rank == 0:
            self.wait_for("leave", self.ranks, LEAVE)
        elif self.store.add("leave/count", 1) == len(self.ranks):
            self.put("leave/all", True)


def join(world: World, environment: Mapping[str, str], point: tuple[str, int], timeout: float) -> Meeting:
    """Meet the others. Raises NotMet, in words."""
    serves = world.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        check_own(*point)
    else:
        reach(*point, timeout)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(open_store(point, f"doctor/{attempt}", serves), world.rank, list(range(world.world_size)))
