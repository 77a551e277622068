"""The store where the ranks of a run meet: its address and port, and connections to it. Every wait has an
end,
and a reason.

A name that means another host, a closed port or a stranger at the port would else be a wait of minutes that
ends in a traceback.
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
STORE_TIMEOUT_S = 8.0
"""seconds that the store gets to answer a connection, on a machine that is not busy"""
RESOLVE_TIMEOUT_S = 5.0
"""seconds that a name gets to be resolved"""


class UnreachableError(Exception):
    """This rank cannot meet the others; the message says why, and after a semicolon what to do."""


def rendezvous_endpoint(world: World, environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The address and port at which the launcher lets the ranks meet; None for one process alone."""
    if world.world_size == 1 and "MASTER_ADDR" not in environment:
        return None
    variables = dict(environment)
    if world.launcher == "srun":
        variables = slurm_rendezvous(environment) | variables
    if world.launcher == "mpirun":
        variables = mpi_rendezvous(environment) | variables
    try:
        return variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    except (KeyError, ValueError):
        address, port = (variables.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"MASTER_ADDR={address} and MASTER_PORT={port} must say where the {world.world_size} ranks meet; "
            "start with torchrun or srun, which do that"
        ) from None


def open_store(
    endpoint: tuple[str, int], prefix: str, serves: bool = False, timeout: float = STORE_TIMEOUT_S
) -> Store:
    """A connection of its own to the store at `endpoint`. Raises UnreachableError if it does not answer
    within
    `timeout` seconds.
    """
    import torch.distributed as dist

    def connect() -> Store:
        return dist.TCPStore(  # type: ignore[attr-defined]  # its stubs forget it
            *endpoint, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )

    where = f"{endpoint[0]}:{endpoint[1]}"
    try:
        # whoever else listens there would not answer, and TCPStore wait for it without end
        store = within(timeout + 1, connect)
    except TimeoutError:
        raise UnreachableError(
            f"something else than a store of torch listens at {where}; another MASTER_PORT"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreachableError(f"the store at {where} does not work: {reason}") from None
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def check_own_endpoint(address: str, port: int) -> None:
    """Rank zero serves the store: the address must be its own, and the port free. Raises UnreachableError."""
    host, resolved = socket.gethostname(), addresses_of(address)
    if not resolved:
        raise UnreachableError(
            f"MASTER_ADDR={address} cannot be resolved on rank zero's own node; use a name that DNS or "
            "/etc/hosts "
            "knows"
        )
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    if not own & set(resolved) and not any(one.startswith("127.") for one in resolved):
        raise UnreachableError(
            f"MASTER_ADDR={address} ({resolved[0]}) is not an address of {host}, rank zero's node; correct it"
        )
    try:
        # as TCPStore does; it listens on all addresses, so does this
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise UnreachableError(
            f"port {port} cannot be had on {host}: {os.strerror(error.errno or 0)}{owner_of(port)}; "
            f"export MASTER_PORT={port + 1}"
        ) from None


def wait_until_open(address: str, port: int, timeout: float) -> None:
    """Wait until a process listens there. Raises UnreachableError, which tells an unknown name from a closed
    port.
    """
    host, deadline = socket.gethostname(), time.monotonic() + timeout
    reason = ""
    while True:
        resolved = addresses_of(address)
        if not resolved:
            reason = (
                f"{host} cannot resolve MASTER_ADDR={address}; use a name that its DNS or /etc/hosts knows, "
                "or an "
                "address"
            )
        for one in resolved:
            where = f"{address}:{port} ({one})"
            patience = max(min(3.0, deadline - time.monotonic()), 0.1)
            try:
                with socket.create_connection((one, port), timeout=patience):
                    return
            except ConnectionRefusedError:
                reason = (
                    f"at {where} nobody listens, seen from {host}; did rank zero start, and is this its "
                    "address?"
                )
            except OSError as error:
                reason = (
                    f"{host} cannot reach {where}: {error.strerror or error}; open a firewall between the "
                    "nodes, "
                    "or choose an interface that both share"
                )
        if time.monotonic() > deadline:
            raise UnreachableError(reason)
        time.sleep(0.2)


def is_open(address: str, port: int) -> bool:
    """Whether a process listens there now."""
    try:
        with socket.create_connection((address, port), timeout=3.0):
            return True
    except OSError:
        return False


def addresses_of(name: str) -> list[str]:
    """The addresses of a host name; none if it cannot be resolved."""
    with contextlib.suppress(OSError, TimeoutError):
        entries = within(RESOLVE_TIMEOUT_S, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        return list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    return []


def owner_of(port: int) -> str:
    """The process that listens at a port, as the end of a message; empty if that cannot be seen."""
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
    """Ranks as ranges: `0-3, 7`."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


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
    """Whether `condition` has become true within so many seconds."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)  # hundreds of ranks ask the same store
    return True
