"""Two hosts on one machine: namespaces with a name, an address and processes of their own, joined by a cable
that can be cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.launch.processes import FOLDER_VARIABLE, LAUNCHER_VARIABLES

REQUIRED_TOOLS = ("ip", "unshare", "nsenter", "mount", "tc")
HOSTS_FILE = "10.9.9.1 n1\n10.9.9.2 n2\n"
CLUSTER_VARIABLES = (*LAUNCHER_VARIABLES, "GROUP_RANK", "GLOO_", "NCCL_")
"""variables that must not come from around the tests"""


@dataclass(frozen=True)
class Host:
    """A host."""

    name: str
    address: str
    holder: int
    """the process that holds its namespaces"""

    @property
    def inside(self) -> tuple[str, ...]:
        """The words that start a command on it."""
        return "nsenter", f"--target={self.holder}", "--net", "--uts", "--mount"

    def run(self, command: str) -> None:
        """Run a command on it, to its end."""
        subprocess.run([*self.inside, *command.split()], check=True)

    def plug(self, plugged: bool) -> None:
        """Put the cable in, or pull it out: nobody is told that a connection has ended."""
        self.run(f"ip link set eth0 {'up' if plugged else 'down'}")

    def processes(self) -> list[psutil.Process]:
        """All that run on it, but for its holder."""
        mine = network_of(self.holder)
        return [
            process
            for process in psutil.process_iter()
            if mine
            and network_of(process.pid) == mine
            and process.pid != self.holder
            and not is_zombie(process)
        ]

    def kill(self) -> None:
        """`kill -9` for all that run on it, at once: none may react to the end of another."""
        found = self.processes()
        for kill in (psutil.Process.suspend, psutil.Process.kill):
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    kill(process)


def network_of(process: int) -> str:
    """The network namespace of a process; empty if it is gone."""
    try:
        return str(Path(f"/proc/{process}/ns/net").readlink())
    except OSError:
        return ""


def is_zombie(process: psutil.Process) -> bool:
    """Whether a process has ended, and is there for its parent to notice only."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextmanager
def two_hosts(folder: Path, files: Mapping[str, str] | None = None, rate: str = "") -> Iterator[list[Host]]:
    """Two hosts joined by a cable. `files` are the /etc/hosts of each by its name; by default they know each
    other.

    Their namespaces have no name on the disk: they end with the processes that hold them, and the cable with
    them; those end by themselves in any case. All that still runs on the hosts at the end is killed.
    """
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [tool for tool in REQUIRED_TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"network namespaces need {', '.join(missing)}")
    holders: list[subprocess.Popen[str]] = []
    hosts: list[Host] = []
    try:
        for number, (name, text) in enumerate((files or {"n1": HOSTS_FILE, "n2": HOSTS_FILE}).items(), 1):
            (folder / name).write_text(f"127.0.0.1 localhost\n{text}")
            files_of_host = f"mount --bind {folder / name} /etc/hosts"
            script = f"hostname {name} && ip link set lo up && {files_of_host} && echo up && exec sleep 3600"
            made = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script]
            holders.append(
                subprocess.Popen(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            answer = holders[-1].stdout
            assert answer is not None
            if (said := answer.readline()) != "up\n":
                pytest.skip(f"no namespace can be made here: {said}")
            hosts.append(Host(name, f"10.9.9.{number}", holders[-1].pid))
        cable = "ip link add eth0 netns {} type veth peer name eth0 netns {}".format(
            *(host.holder for host in hosts)
        )
        subprocess.run(cable.split(), check=True)
        for host in hosts:
            host.run(f"ip addr add {host.address}/24 dev eth0")
            host.run("ip link set eth0 up")
            if rate:
                host.run(f"tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 50ms")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for holder in holders:
            holder.kill()
            holder.communicate()


def start_on_host(
    host: Host, words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start python with `words` on a host, in a process group of its own, without what a launcher around the
    tests has set.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTER_VARIABLES)}
    return subprocess.Popen(
        [
            *host.inside,
            f"--wd={cwd}",
            sys.executable,
            *words,
        ],  # a change of the mount namespace goes to the root folder
        cwd=cwd,
        env={
            **clean,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            FOLDER_VARIABLE: str(cwd),
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launcher_env(rank: int, address: str, port: int) -> dict[str, str]:
    """What a launcher of two nodes sets."""
    places = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return {name: str(value) for name, value in places.items()} | {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
