"""The ranks exchange dataclasses through a torch store. Every wait has a timeout, and nothing is a
collective: collectives are among what is checked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from launch.runtime.store import check_own_endpoint, open_store, wait_until_open
from launch.runtime.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it, its stubs do not

T = TypeVar("T")
FINISH_TIMEOUT_S = 5.0
"""for which rank zero, who may serve the store, waits until the others have read the exit code"""


def to_json(value: Any) -> str:
    """A dataclass, with all that it holds, or a plain value."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(value)).dump_json(value).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """The value of the type `kind` that `to_json` wrote."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_json(text)


class Exchange:
    """A rank's access to the store. `ranks` are those that take part: all that are expected, until rank zero
    knows.
    """

    def __init__(self, store: Store, rank: int, ranks: list[int]) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks

    def put(self, key: str, value: Any) -> None:
        """Publish a value; each key once."""
        self.store.set(key, to_json(value))

    def get(self, key: str, kind: type[T], timeout_s: float) -> T:
        """The value of the type `kind` that some rank publishes under `key`. Raises TimeoutError."""
        import torch.distributed as dist

        try:
            self.store.wait([key], timedelta(seconds=max(timeout_s, 0.01)))
        except dist.DistStoreError:
            raise TimeoutError(
                f"nothing from the other ranks ({key}) within {timeout_s:.0f} s; see what rank zero prints"
            ) from None
        return from_json(kind, self.store.get(key))

    def gather(self, name: str, value: T, timeout_s: float) -> dict[int, T]:
        """On rank zero the values by rank, without those that do not come within `timeout_s`; elsewhere
        empty.
        """
        self.put(f"{name}/{self.rank}", value)
        if self.rank > 0:
            return {}
        deadline = time.monotonic() + timeout_s
        values: dict[int, T] = {}
        for rank in self.ranks:
            try:
                values[rank] = self.get(f"{name}/{rank}", type(value), deadline - time.monotonic())
            except TimeoutError:
                continue
        return values

    def broadcast(self, name: str, value: T | None, kind: type[T], timeout_s: float) -> T:
        """Rank zero's `value` of the type `kind` on every rank; the others pass None. Raises TimeoutError."""
        if self.rank > 0:
            return self.get(name, kind, timeout_s)
        assert value is not None
        self.put(name, value)
        return value

    def barrier(self, name: str, ranks: list[int], timeout_s: float) -> bool:
        """Wait until all of `ranks` have reached the point `name`; whether they have, within `timeout_s`."""
        if self.store.add(f"{name}/count", 1) == len(ranks):
            self.put(f"{name}/all", True)
        try:
            return self.get(f"{name}/all", bool, timeout_s)
        except TimeoutError:
            return False

    def finish(self) -> None:
        """The last call; rank zero, who may serve the store, stays until all have read what it broadcast."""
        if self.rank == 0:
            self.barrier("finish", self.ranks, FINISH_TIMEOUT_S)
        elif self.store.add("finish/count", 1) == len(self.ranks):
            self.put("finish/all", True)


def connect(
    world: World, environment: Mapping[str, str], endpoint: tuple[str, int], timeout_s: float
) -> Exchange:
    """Connect this rank to the store at `endpoint`. Raises UnreachableError with the reason and the fix."""
    serves = world.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        check_own_endpoint(*endpoint)
    else:
        wait_until_open(*endpoint, timeout_s)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = open_store(endpoint, f"doctor/{attempt}", serves)
    return Exchange(store, world.rank, list(range(world.world_size)))
