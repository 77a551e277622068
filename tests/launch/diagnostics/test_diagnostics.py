"""The parts of the doctor: each check on this machine, and each comparison on reports made by hand."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.diagnostics import bandwidth, cross_node, gpus, machine, network, software, table
from launch.diagnostics.report import Finding, Report, findings_of_json, leaders_of, listed, nodes_of, tried
from launch.runtime.store import UnreachableError, check_own
from launch.runtime.world import World
from tests.launch.processes import COMMAND_TIMEOUT_S

NETWORK: dict[str, Any] = {
    "hostname": "n1",
    "resolves": ["10.0.0.1"],
    "master": "n1",
    "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]},
    "route": "eth0",
    "address": "10.0.0.1",
    "speed": 10_000,
    "mtu": 1500,
    "infiniband": 0,
    "gloo": None,
    "nccl": None,
}
VERSIONS = {"python": "3.12.1", "torch": "2.14.1", "code": "00000000", "driver": "580.1"}
H100 = [{"index": str(n), "uuid": f"GPU-{n}", "name": "H100", "used": 0, "total": 80_000} for n in range(2)]


def report(rank: int, host: str, local_rank: int = 0, **facts: Mapping[str, Any]) -> Report:
    """A healthy rank, except for `facts`."""
    healthy: dict[str, Any] = {
        "network": NETWORK,
        "software": {
            "versions": VERSIONS,
            "executable": "/env/bin/python",
            "packages": "/env",
            "environment": {},
        },
        "gpu": {"device": "cpu", "problem": "", "count": 0, "visible": None, "cuda": None},
        "gpus": [],
        "cpu": {"cpus": [0, 1, 2, 3], "quota": None, "machine_cpus": 4, "threads": 1},
    }
    for name, changed in facts.items():
        healthy[name] = {**healthy[name], **changed} if isinstance(changed, dict) else changed
    return Report(rank=rank, local_rank=local_rank, host=host, facts=healthy)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# one machine ------------------------------------------------------------------------------------------------


def test_checks_of_this_machine(tmp_path: Path) -> None:
    found = [
        *machine.shared_memory(),
        *machine.open_files(),
        *machine.locked_memory(),
        *machine.disk(tmp_path / "a" / "b"),
    ]
    assert [finding.check for finding in found] == ["shared memory", "open files", "disk"]
    assert all(finding.found and (finding.status == "pass") == (not finding.fix) for finding in found)
    assert found[-1].found.startswith(f"{tmp_path} (")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written() -> None:
    found = only(list(machine.disk(Path("/proc"))))
    assert found.status == "fail"
    assert "/proc must be writable" in found.fix


def test_locked_memory_with_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert network.infiniband_speed(tmp_path) == 400_000
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (65536, 65536))
    assert "ulimit -l unlimited" in only(list(machine.locked_memory(tmp_path))).fix


def test_cpus() -> None:
    assert only(machine.cpus([report(0, "n1")], 4)).status == "pass"
    assert "2 for 4 rank(s)" in only(machine.cpus([report(0, "n1", cpu={"quota": 2.0})], 4)).found
    assert "OMP_NUM_THREADS=2" in only(machine.cpus([report(0, "n1", cpu={"threads": 4})], 2)).fix
    assert "--cpu-bind=none" in only(machine.cpus([report(0, "n1", cpu={"cpus": [3]})], 1)).fix
    apart = [report(rank, "n1", rank, cpu={"cpus": [rank]}) for rank in range(4)]  # as SLURM binds tasks
    assert only(machine.cpus(apart, 4)).found == "4 for 4 rank(s) of 1 thread(s)"


def test_extensions(tmp_path: Path) -> None:
    packages, build = tmp_path / "mine", tmp_path / "cache" / "cpu_adam"
    build.mkdir(parents=True)
    assert not list(machine.extensions(build.parent, str(packages)))
    (build / "build.ninja").write_text(
        f"cflags = -isystem {packages}/torch/include -isystem {packages}/torch/include/TH\n"
    )
    assert only(list(machine.extensions(build.parent, str(packages)))).status == "pass"
    other = only(list(machine.extensions(build.parent, "/other")))
    assert (other.status, str(packages) in other.found, "TORCH_EXTENSIONS_DIR=" in other.fix) == (
        "warn",
        True,
        True,
    )
    (build / "lock").touch()
    os.utime(build / "lock", (0, 0))
    source = packages / "torch" / "utils" / "cpp_extension.py"
    source.parent.mkdir(parents=True)
    source.write_text("with FileLock(path):")  # the kernel releases it: nothing hangs
    assert only(list(machine.extensions(build.parent, str(packages)))).status == "pass"
    source.write_text("baton = FileBaton(path)")
    assert only(list(machine.extensions(build.parent, str(packages)))).fix == f"rm {build / 'lock'}"


def test_software_of_this_machine() -> None:
    facts = software.facts(
        {"NCCL_DEBUG": "INFO", "HOME": "/", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "0,1"}
    )
    assert {"python", "torch", "code"} <= facts["versions"].keys()
    assert facts["environment"] == {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "2 device(s)"}


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        found = only(list(network.free_port(port)))
        assert f"by process {os.getpid()}" in found.found
        with pytest.raises(
            UnreachableError, match=f"port {port} cannot be had .*; export MASTER_PORT={port + 1}"
        ):
            check_own("localhost", port)
    assert only(list(network.free_port(port))).status == "pass"


def test_a_check_that_hangs_or_raises_is_a_finding() -> None:
    end = threading.Event()

    def hangs() -> list[Finding]:
        end.wait(COMMAND_TIMEOUT_S)
        return []

    finding = only(tried("disk", 0.1, hangs))
    assert "no answer within 0.1 s" in finding.found
    assert not end.is_set(), "the check still hangs: nobody has waited for it"
    end.set()
    assert only(tried("disk", 1, lambda: [][1])).found.startswith("IndexError")


# names, interfaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        ({}, "pass", "10.0.0.1 (eth0)"),
        ({"resolves": ["127.0.1.1"]}, "fail", "the other nodes would connect to themselves"),
        ({"resolves": []}, "fail", "cannot be resolved"),
        ({"resolves": ["10.9.9.9"]}, "fail", "no interface of it has"),
        ({"route": "ib0"}, "warn", "reaches the master by ib0"),
        ({"resolves": ["127.0.1.1"], "gloo": "eth0"}, "pass", "eth0, by GLOO_SOCKET_IFNAME"),
        ({"gloo": "eth7"}, "fail", "GLOO_SOCKET_IFNAME=eth7, but there are lo, eth0, ib0"),
        ({"gloo": "lo"}, "fail", "reaches no other node"),
        ({"nccl": "=eth"}, "fail", "NCCL_SOCKET_IFNAME==eth"),
        ({"nccl": "^lo,docker"}, "pass", "10.0.0.1 (eth0)"),
        ({"nccl": "eth"}, "pass", "10.0.0.1 (eth0)"),
    ],
)
def test_the_interface_that_torch_takes(facts: dict[str, Any], status: str, words: str) -> None:
    found = only(network.names([report(0, "n1", network=facts)], several=True))
    assert (found.status, words in found.found) == (status, True), found
    if status == "fail":
        assert "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in found.fix


def test_names_do_not_matter_on_one_node() -> None:
    assert (
        only(network.names([report(0, "n1", network={"resolves": ["127.0.1.1"]})], several=False)).status
        == "pass"
    )


def test_nodes_that_are_one_machine() -> None:
    loopback = {"resolves": ["127.0.0.1"], "route": "lo"}
    both = [report(rank, f"n{rank}", network=loopback) for rank in range(2)]
    assert only(network.names(both, several=True)).status == "pass"
    assert only(network.names(both[:1], several=True)).status == "fail"


def test_the_link() -> None:
    reports = [report(0, "n1"), report(1, "n2", network={"mtu": 9000})]
    apart = network.link(reports, several=True)[-1]
    assert (apart.status, apart.found) == ("warn", "the MTU differs: n1 1500, n2 9000")
    lost = only(network.link([report(0, "n1", network={"route": None, "mtu": 0})], several=True))
    assert (lost.status, lost.found) == ("fail", "no route to the master n1")


# versions, environment, GPUs --------------------------------------------------------------------------------


def with_versions(*torch: str) -> list[Report]:
    return [
        report(n, f"n{n}", software={"versions": {**VERSIONS, "torch": version}})
        for n, version in enumerate(torch)
    ]


def test_versions_that_differ() -> None:
    found = only(software.same_versions(with_versions("2.14.1", "2.14.1", "2.11.0")))
    assert (found.status, found.found) == ("fail", "torch is 2.14.1 on n0, n1; 2.11.0 on n2")
    assert (found.fix, found.nodes) == ("pip install torch==2.14.1 on n2", ("n2",))
    assert only(software.same_versions(with_versions("2.14.1", "2.14.1"))).status == "pass"
    driver = [report(0, "n1"), report(1, "n2", software={"versions": {**VERSIONS, "driver": "570.1"}})]
    assert only(software.same_versions(driver)).status == "warn"
    place = [report(0, "n1"), report(1, "n2", software={"executable": "/usr/bin/python"})]
    assert "/usr/bin/python on n2" in only(software.same_versions(place)).found


def test_variables_that_differ() -> None:
    reports = [report(0, "n1", software={"environment": {"NCCL_ALGO": "Ring"}}), report(1, "n2")]
    assert only(software.same_environment(reports)).found == "NCCL_ALGO: Ring on n1; not set on n2"


def on_gpus(*devices: str, **facts: Any) -> list[Report]:
    fact = {"count": 2, **facts}
    return [report(n, "n1", n, gpus=H100, gpu={**fact, "device": device}) for n, device in enumerate(devices)]


def test_gpus() -> None:
    assert only(gpus.mapped([report(0, "n1")])).found == "none: ranks run on the CPU, by gloo"
    assert only(gpus.mapped(on_gpus("cuda:0", "cuda:1"))).found == "2 x H100; rank 0: GPU 0, rank 1: GPU 1"
    assert only(gpus.mapped(on_gpus("cuda:0", visible="1", count=1))).found == "1 x H100; rank 0: GPU 1"
    twice = only(gpus.mapped(on_gpus("cuda:0", "cuda:0")))
    assert (twice.status, twice.found) == ("fail", "rank 0 and 1: GPU 0")
    blind = only(gpus.mapped(on_gpus("cpu", count=0, cuda="13.0")))
    assert (blind.status, blind.found) == ("fail", "nvidia-smi sees 2 GPU(s), torch none")
    hidden = only(gpus.mapped(on_gpus("cpu", count=0, visible="")))
    assert hidden.status == "pass"
    mixed = only(gpus.mapped([*on_gpus("cuda:0"), report(1, "n2")]))
    assert (mixed.status, mixed.fix) == ("fail", "leave out n2")
    few = only(gpus.mapped(on_gpus("cpu", problem="4 ranks on 2 GPU(s); start fewer")))
    assert (few.found, few.fix) == ("4 ranks on 2 GPU(s)", "start fewer")


def test_gpus_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi: there is no GPU here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"#!/bin/sh\ncase $1 in *apps*) echo 'GPU-0, 999999, python'; echo 'GPU-1, {os.getpid()}, python';; esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    busy = [{**H100[0], "used": 40_000}, H100[1]]
    found = only(list(gpus.in_use(busy, None)))
    assert (found.status, found.found) == ("fail", "GPU 0: 40,000 of 80,000 MiB, 999999 (python)")
    assert only(list(gpus.in_use(H100, None))).status == "warn"
    assert only(list(gpus.in_use(busy, "1"))).found == "by nobody"
    assert not list(gpus.in_use([], None))


# several nodes ----------------------------------------------------------------------------------------------


def test_ranks_that_are_missing() -> None:
    world = World(world_size=4, local_world_size=2, launcher="srun")
    reports = [report(0, "localhost"), report(1, "localhost", 1)]
    found = cross_node.present(reports, world, {"SLURM_STEP_NODELIST": "localhost,nowhere.invalid"})
    assert (
        found.found
        == "expected 4 ranks on localhost, nowhere.invalid; saw 0-1 from localhost, none from nowhere.invalid"
    )
    assert found.fix.startswith("nowhere.invalid cannot be resolved from here")
    assert cross_node.present(reports, world, {}).found == "expected 4 ranks; saw 0-1 from localhost, not 2-3"
    assert cross_node.present(reports, World(world_size=2), {}).status == "pass"


def test_lists_of_hosts() -> None:
    assert cross_node.hosts_of({"SLURM_STEP_NODELIST": "n[1-2,07],m1,k[098-100]-ib"}) == [
        *("n1", "n2", "n07", "m1", "k098-ib", "k099-ib", "k100-ib")
    ]
    assert cross_node.hosts_of({}) == []


def test_clocks() -> None:
    good, slow, wrong = cross_node.clocks(
        {"n2": (0.002, 0.001), "n3": (-5.0, 0.001), "n4": (90.0, 0.5)}, "n1"
    )
    assert (good.status, good.found) == ("pass", "at most 2.0 ms from n1 (± 1.0 ms)")
    assert (slow.status, slow.found, slow.nodes) == ("warn", "5.0 s behind n1 (± 1.0 ms)", ("n3",))
    assert (wrong.status, wrong.found) == ("fail", "90.0 s ahead of n1 (± 500.0 ms)")
    assert only(cross_node.clocks({"n2": (3.0, 2.5)}, "n1")).status == "pass"  # the error may be all of it


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    looked = {
        "n1": {"missing": [1], "problem": "", "seconds": 5},
        "n2": {"missing": [], "problem": "", "seconds": 0},
    }
    bad, good = cross_node.one_folder(looked, {0: "n1", 1: "n2"}, str(tmp_path))
    assert (bad.status, bad.nodes) == ("fail", ("n1",))
    assert bad.found == f"{tmp_path}: sees nothing of what n2 wrote there"
    assert good.status == "pass"


def result(first: int, second: int, rate: float = 1e9, **more: Any) -> dict[str, Any]:
    return {"pair": [first, second], "all_reduce": rate, "all_gather": rate / 2, **more}


def test_bandwidth_is_judged_by_the_link() -> None:
    reports = [report(n, f"n{n}") for n in range(4)]
    found = bandwidth.judge([result(0, 1), result(1, 2, 2e8), result(2, 3, problem="timed out")], reports)
    assert [finding.status for finding in found] == ["pass", "warn", "fail"]
    assert (
        found[0].found
        == "n0 - n1: all-reduce 1 GB/s, all-gather 0.5 GB/s; the link has 10 Gb/s, that is 1.25 GB/s"
    )
    assert found[2].found == "n2 - n3: timed out"
    fast = [report(n, f"n{n}", network={"speed": 400_000}) for n in range(2)]
    assert only(bandwidth.judge([result(0, 1)], fast)).status == "pass"  # gloo fills no such link


def test_bandwidth_is_judged_by_the_others_where_the_link_does_not_tell() -> None:
    reports = [report(n, f"n{n}", network={"speed": 0}) for n in range(6)]
    good, slow = bandwidth.judge([*(result(n, n + 1) for n in range(4)), result(4, 5, 4e8)], reports)
    assert (good.status, slow.status, slow.nodes) == ("pass", "warn", ("n4", "n5"))
    assert good.found.startswith("n0 - n1, n1 - n2, n2 - n3, n3 - n4: all-reduce 1 GB/s")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64, 65])
def test_neighbours_are_measured_in_few_rounds(ranks: int) -> None:
    rounds = bandwidth.neighbours([report(rank, f"n{rank}") for rank in range(ranks)])
    pairs = [pair for turn in rounds for pair in turn]
    assert len(pairs) == len(set(pairs)) == {1: 0, 2: 1}.get(ranks, ranks)
    assert len(rounds) <= 3
    assert all(len({rank for pair in turn for rank in pair}) == 2 * len(turn) for turn in rounds)


def test_nodes_and_their_leaders() -> None:
    reports = [report(0, "a"), report(1, "a", 1), report(2, "b"), replace(report(3, "b"), node=1)]
    assert list(nodes_of(reports)) == ["a", "b#0", "b#1"]
    assert [leader.rank for leader in leaders_of(reports).values()] == [0, 2, 3]
    assert bandwidth.neighbours(reports)[-1] == [(0, 1)]
    assert listed([f"n{n}" for n in range(9)]) == "n0, n1, n2, n3 and 5 more nodes"


def test_a_report_travels_as_json() -> None:
    sent = report(1, "n1")
    sent.findings = [Finding(check="disk", found="there", nodes=("n1",))]
    assert Report.of_json(json.loads(json.dumps(sent.to_json()))) == sent
    assert findings_of_json([]) == []


# the table --------------------------------------------------------------------------------------------------


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"rm {'/a/long/path' * 9}"
    findings = [
        Finding(check="disk", found="800 GB free", nodes=("n2",)),
        Finding(check="disk", found="700 GB free", nodes=("n1",)),
        Finding(check="extensions", status="fail", found="a lock is left", fix=command, nodes=("n2",)),
        Finding(check="clock", status="warn", found="word " * 40, nodes=("n1",)),
        *(Finding(check="cpus", found="4", nodes=(node,)) for node in ("n2", "n1")),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert table.show("doctor", findings, ["n1", "n2"], 1.0) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[2:4] == [
        "cpus        pass  n1, n2  4",
        "disk        pass  n1, n2  n2: 800 GB free; n1: 700 GB free",
    ]
    assert command in said.replace("\n", " ").replace("  ", "")
    assert f"{'/a/long/path' * 9}\n" in said  # whole, to be copied
    assert said.endswith("2 pass, 1 warn, 1 fail, in 1.0 s\n")
    assert max(len(line) for line in said.splitlines() if "/a/long" not in line) <= 80
    assert table.show("doctor", findings[:2], ["n1", "n2"], 1.0) == 0
