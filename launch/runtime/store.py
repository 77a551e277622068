"""Where the ranks of a run meet, and how one gets there: the address, the port, the store. Every wait has an
end, and a reason.

A name that means another host, a closed door or a stranger at the port would else be a wait of minutes that
ends in a backtrace.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import psutil

from launch.runtime.world import World, mpi_rendezvous, slurm_rendezvous

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it

T = TypeVar("T")
OPEN = 8.0
"""seconds that the store gets to answer a connection, on a machine that is not busy"""
RESOLVE = 5.0
"""seconds that a name gets to be resolved"""


class UnreachableError(Exception):
    """This rank cannot meet the others; the words say why, and after a semicolon what to do."""


def rendezvous_endpoint(world: World, environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The address and port at which the launcher lets the ranks meet; None for one process alone."""
    if world.world_size == 1 and "MASTER_ADDR" not in environment:
        return None
    found = dict(environment)
    if world.launcher == "srun":
        found = slurm_rendezvous(environment) | found
    if world.launcher == "mpirun":
        found = mpi_rendezvous(environment) | found
    try:
        return found["MASTER_ADDR"], int(found["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ValueError(
            f"MASTER_ADDR={found.get('MASTER_ADDR', '')} and MASTER_PORT={found.get('MASTER_PORT', '')} must say where the "
            f"{world.world_size} ranks meet; start with torchrun or srun, which do that"
        ) from None


def open_store(point: tuple[str, int], prefix: str, serves: bool = False, seconds: float = OPEN) -> Store:
    """A connection of its own to the store at `point`. Raises NotMet if it does not answer within `seconds`."""
    import torch.distributed as dist

    patience = timedelta(seconds=seconds)

    def open() -> Store:
        return dist.TCPStore(*point, is_master=serves, wait_for_workers=False, timeout=patience)  # type: ignore[attr-defined]

    try:
        # whoever else listens there would not answer, and TCPStore wait for it without end
        store = within(seconds + 1, open)
    except TimeoutError:
        raise UnreachableError(
            f"something else than a store of torch listens at {point[0]}:{point[1]}; another MASTER_PORT"
        ) from None
    except RuntimeError as error:
        raise UnreachableError(
            f"the store at {point[0]}:{point[1]} does not work: {' '.join(str(error).split())[:200]}"
        ) from None
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def check_own(address: str, port: int) -> None:
    """Rank zero serves the store: the address must be its own, and the port free. Raises NotMet."""
    found = addresses_of(address)
    if not found:
        raise UnreachableError(
            f"MASTER_ADDR={address} cannot be resolved on rank zero's own node; use a name that DNS or /etc/hosts knows"
        )
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    if not own & set(found) and not any(word.startswith("127.") for word in found):
        raise UnreachableError(
            f"MASTER_ADDR={address} ({found[0]}) is not an address of {socket.gethostname()}, rank zero's node; correct it"
        )
    try:
        # as TCPStore does; it listens on all addresses, so does this
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise UnreachableError(
            f"port {port} cannot be had on {socket.gethostname()}: {os.strerror(error.errno or 0)}{owner_of(port)}; "
            f"export MASTER_PORT={port + 1}"
        ) from None


def reach(address: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there. Raises NotMet, which tells an unknown name from a closed door."""
    host, deadline = socket.gethostname(), time.monotonic() + timeout
    why = ""
    while True:
        found = addresses_of(address)
        if not found:
            why = f"{host} cannot resolve MASTER_ADDR={address}; use a name that its DNS or /etc/hosts knows, or an address"
        for one in found:
            try:
                with socket.create_connection(
                    (one, port), timeout=max(min(3.0, deadline - time.monotonic()), 0.1)
                ):
                    return
            except ConnectionRefusedError:
                why = f"at {address}:{port} ({one}) nobody listens, seen from {host}; did rank zero start, and is this its address?"
            except OSError as error:
                why = (
                    f"{host} cannot reach {address}:{port} ({one}): {error.strerror or error}; open a firewall between the "
                    "nodes, or choose an interface that both share"
                )
        if time.monotonic() > deadline:
            raise UnreachableError(why)
        time.sleep(0.2)


def is_open(address: str, port: int) -> bool:
    """Whether somebody listens there now."""
    try:
        with socket.create_connection((address, port), timeout=3.0):
            return True
    except OSError:
        return False


def addresses_of(name: str) -> list[str]:
    """What the name stands for; nothing if it cannot be resolved."""
    with contextlib.suppress(OSError, TimeoutError):
        found = within(RESOLVE, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return []


def owner_of(port: int) -> str:
    """By which process a port is taken, in words; empty if that cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.laddr
                and connection.laddr.port == port
                and connection.status == psutil.CONN_LISTEN
                and connection.pid
            ):
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def spans(ranks: Iterable[int]) -> str:
    """Numbers in words: 0-3, 7."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


# waits that end ---------------------------------------------------------------------------------------------


def within(seconds: float, function: Callable[[], T]) -> T:
    """What `function` returns or raises. Raises TimeoutError if that takes longer.

    The thread of a call that hangs (a dead file server, a collective) cannot be ended: it is left behind as a
    daemon, and the command ends without waiting for it.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` has come true within so many seconds."""
    until, pause = time.monotonic() + seconds, 0.01
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)  # hundreds of ranks ask the same store
    return True
