"""The doctor as users call it: alone, under torchrun, with a rank missing, on two hosts that are network
namespaces.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs forget it

from launch.diagnostics import cross_node
from launch.diagnostics.cross_node import SharedStorageResult
from launch.diagnostics.exchange import Exchange
from launch.runtime.store import UnreachableError, check_own_endpoint, open_store, wait_until_open, within
from tests.launch.hosts import CLUSTER_VARIABLES, HOSTS_FILE, Host, launcher_env, two_hosts
from tests.launch.processes import (
    COMMAND_TIMEOUT_S,
    PATIENCE,
    CommandResult,
    free_port,
    rankzero,
    wait_for_command,
)

First = TypeVar("First")
Second = TypeVar("Second")


def start(
    *args: str, cwd: Path, ranks: int = 0, env: Mapping[str, str] | None = None, inside: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start the doctor; `inside` is a command that starts it elsewhere (nsenter)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTER_VARIABLES)}
    return subprocess.Popen(
        [*inside, *rankzero("doctor", *args, ranks=ranks)],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "10000", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def call(*args: str, cwd: Path, ranks: int = 0, env: Mapping[str, str] | None = None) -> CommandResult:
    """Run the doctor to its end."""
    return wait_for_command(start(*args, cwd=cwd, ranks=ranks, env=env))


def row(done: CommandResult, check: str) -> str:
    """The row of a check: its status and the rest, with single spaces."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{check}  ")]
    assert len(lines) == 1, done.stdout + done.stderr
    return " ".join(lines[0].removeprefix(check).split())


def only_line(done: CommandResult) -> str:
    (line,) = done.messages
    return line


def wait_until_files(folder: Path) -> None:
    """Until the doctor tries the disk: it has imported torch then, and has not met the others yet."""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not list(folder.glob(".doctor-*")) and time.monotonic() < deadline:
        time.sleep(0.002)


# one machine ------------------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    done = call("run_dir=runs/new", cwd=tmp_path)
    assert done.returncode == int(" 0 fail" not in done.stdout), done.stdout + done.stderr
    assert f" {tmp_path} (" in row(done, "disk")
    assert not list(tmp_path.iterdir())


def test_help_imports_no_torch(tmp_path: Path) -> None:
    done = call("--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "launch.diagnostics.run_all" in modules
    assert not {"torch", "numpy", "pydantic"} & modules
    assert done.stdout.startswith("Check the machines")
    narrow = call("--help", cwd=tmp_path, env={"COLUMNS": "80"}).stdout
    assert max(map(len, narrow.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("rundir=x", "rundir is not a key of doctor; did you mean run_dir?"),
        ("timeout=0", "timeout=0 must be greater than 0 and below 3600 (default: 20.0)"),
        ("timeout=soon", "timeout=soon is not float"),
        ("fast", "'fast' is not key=value"),
    ],
)
def test_mistakes(tmp_path: Path, arg: str, message: str) -> None:
    done = call(arg, cwd=tmp_path)
    assert (done.returncode, message in only_line(done)) == (2, True), done.stderr


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    done = call(cwd=tmp_path, ranks=2)
    assert row(done, "ranks") == "pass 2 of 2 joined"
    assert row(done, "intra-node").startswith("pass rank 0 - rank 1: all-reduce ")
    assert done.stdout.count("doctor:") == 1
    assert done.returncode == int(" 0 fail" not in done.stdout)
    assert not list(tmp_path.iterdir())


# ranks that do not join, or are lost ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_missing_rank(tmp_path: Path) -> None:
    port = free_port()
    done = call("timeout=2", cwd=tmp_path, env=launcher_env(0, "127.0.0.1", port))
    assert done.returncode == 1
    assert row(done, "ranks").startswith("fail expected 2 ranks; saw 0 from ")


@pytest.mark.slow
def test_a_rank_without_rank_zero(tmp_path: Path) -> None:
    done = call("timeout=1", cwd=tmp_path, env=launcher_env(1, "127.0.0.1", free_port()))
    assert done.returncode == 1
    assert "nobody listens" in only_line(done)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_on_the_way(tmp_path: Path, victim: int) -> None:
    """SIGSTOP: the connections stay, only nothing comes any more."""
    port = free_port()
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    ranks = [
        start("timeout=4", cwd=folders[rank], env=launcher_env(rank, "127.0.0.1", port)) for rank in range(2)
    ]
    wait_until_files(folders[victim])
    os.killpg(ranks[victim].pid, signal.SIGSTOP)
    done = wait_for_command(ranks[1 - victim])
    os.killpg(ranks[victim].pid, signal.SIGKILL)
    ranks[victim].communicate()
    assert done.returncode == 1
    assert only_line(done) if victim == 0 else row(done, "ranks"), done.stdout + done.stderr


@pytest.mark.slow
def test_the_term_signal_leaves_no_file(tmp_path: Path) -> None:
    process = start(cwd=tmp_path)
    wait_until_files(tmp_path)
    process.terminate()
    wait_for_command(process)
    assert not list(tmp_path.iterdir())


# the exchange -----------------------------------------------------------------------------------------------


def test_what_keeps_a_rank_from_the_master() -> None:
    with pytest.raises(UnreachableError, match=r"cannot resolve MASTER_ADDR=nowhere.invalid"):
        wait_until_open("nowhere.invalid", 1, 0.1)
    with pytest.raises(UnreachableError, match="nobody listens"):
        wait_until_open("127.0.0.1", 1, 0.1)
    with pytest.raises(UnreachableError, match=r"192.0.2.77.* is not an address of"):
        check_own_endpoint("192.0.2.77", 1)


@pytest.mark.slow
def test_a_stranger_on_the_port_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.runtime.store.STORE_TIMEOUT_S", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(UnreachableError, match="something else than a store"),
    ):
        open_store(("127.0.0.1", server.getsockname()[1]), "doctor")


def test_two_ranks_in_a_store(tmp_path: Path) -> None:
    """Clock and shared storage, of two nodes that are two threads."""

    def storage(rank: int) -> SharedStorageResult:
        return cross_node.probe_shared_storage(exchanges[rank], [0, 1], tmp_path, "token")

    def both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        with ThreadPoolExecutor(2) as threads:
            futures = threads.submit(first), threads.submit(second)
            return futures[0].result(COMMAND_TIMEOUT_S), futures[1].result(COMMAND_TIMEOUT_S)

    # each with a connection of its own, as in processes; port 0 is any that is free
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    exchanges = [Exchange(server, 0, [0, 1]), Exchange(client, 1, [0, 1])]
    none, offset = both(
        lambda: cross_node.measure_clock(exchanges[0], [0, 1]),
        lambda: cross_node.measure_clock(exchanges[1], [0, 1]),
    )
    assert none is None
    assert offset is not None
    assert abs(offset.ahead_s) <= offset.error_s + 0.01 < PATIENCE
    first, second = both(lambda: storage(0), lambda: storage(1))
    assert (first.missing_ranks, second.missing_ranks) == ([], [])
    assert not list(tmp_path.iterdir())
    assert exchanges[0].gather("late", 1, 0.1) == {0: 1}
    with pytest.raises(TimeoutError, match="nothing from the other ranks"):
        exchanges[1].broadcast("plan", None, int, 0.1)
    assert within(COMMAND_TIMEOUT_S, lambda: exchanges[1].barrier("alone", [0, 1], 0.1)) is False


# two hosts --------------------------------------------------------------------------------------------------


def on_both(hosts: list[Host], folder: Path, address: str, *args: str, **env: str) -> list[CommandResult]:
    """What the doctor prints on each."""
    started = [
        start(*args, cwd=folder, env={**launcher_env(rank, address, 29500), **env}, inside=host.inside)
        for rank, host in enumerate(hosts)
    ]
    return [wait_for_command(process) for process in started]


@pytest.mark.slow
def test_two_hosts(tmp_path: Path) -> None:
    with two_hosts(tmp_path, {"n1": HOSTS_FILE, "n2": HOSTS_FILE}) as hosts:
        first, second = on_both(hosts, tmp_path, "n1", "timeout=60")
    assert row(first, "ranks") == "pass n1, n2 2 of 2 joined"
    assert row(first, "hostname").startswith("pass n1, n2 n1: its own name is 10.9.9.1 (eth0)")
    assert row(first, "network") == "pass n1, n2 eth0, 10 Gb/s, MTU 1500"
    assert row(first, "shared storage").startswith("pass n1, n2")
    assert row(first, "clock").startswith("pass n2")
    # a veth has no speed of its own, a busy machine little
    assert row(first, "bandwidth").startswith(
        ("pass n1, n2 n1 - n2: all-reduce ", "warn n1, n2 n1 - n2: all-reduce ")
    )
    assert first.returncode == second.returncode == int(" 0 fail" not in first.stdout)
    assert not second.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n1", "n2"]


@pytest.mark.slow
def test_two_hosts_on_a_slow_cable_without_shared_storage(tmp_path: Path) -> None:
    with two_hosts(tmp_path, {"n1": HOSTS_FILE, "n2": HOSTS_FILE}, rate="200mbit") as hosts:
        (run_dir := tmp_path / "runs").mkdir()
        for host in hosts:  # one path, two file systems
            host.run(f"mount -t tmpfs none {run_dir}")
        first, _ = on_both(hosts, tmp_path, "n1", f"run_dir={run_dir}", "timeout=60")
    for other in ("n1", "n2"):
        assert f"{run_dir}: does not see what {other} wrote there" in first.stdout
    assert row(first, "bandwidth").startswith("warn n1, n2 n1 - n2: all-reduce 0.0")
    assert first.returncode == 1


@pytest.mark.slow
def test_two_hosts_whose_names_resolve_to_loopback(tmp_path: Path) -> None:
    """Debian's installer writes `127.0.1.1 HOSTNAME` into /etc/hosts: gloo binds to it, and the others
    connect to themselves.
    """
    with two_hosts(tmp_path, {host: f"127.0.1.1 {host}\n" for host in ("n1", "n2")}) as hosts:
        first, second = on_both(hosts, tmp_path, "10.9.9.1", "timeout=60")
        cured, _ = on_both(hosts, tmp_path, "10.9.9.1", "timeout=60", GLOO_SOCKET_IFNAME="eth0")
    assert row(first, "hostname").startswith("fail n1, n2 its own name is 127.0.1.1")
    assert "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in first.stdout
    assert row(first, "bandwidth").startswith("fail n1, n2 n1 - n2: ")
    assert first.returncode == second.returncode == 1
    assert row(cured, "hostname").startswith("pass")
    assert not row(cured, "bandwidth").startswith("fail")


@pytest.mark.slow
def test_two_hosts_of_which_one_cannot_resolve_the_master(tmp_path: Path) -> None:
    with two_hosts(tmp_path, {"n1": HOSTS_FILE, "n2": ""}) as hosts:
        first, second = on_both(hosts, tmp_path, "n1", "timeout=4", SLURM_STEP_NODELIST="n[1-2]")
    assert "expected 2 ranks on n1, n2; saw 0 from n1, none from n2" in first.stdout
    assert "n2 cannot resolve MASTER_ADDR=n1" in only_line(second)
    assert first.returncode == second.returncode == 1
