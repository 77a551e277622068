"""The checks that a rank makes by itself: real ones on this machine, and some in files made by hand."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path

import pytest

from launch.diagnostics import gpus, machine, network, software
from launch.diagnostics.findings import Finding, run_check
from launch.diagnostics.system_info import GPU
from launch.runtime.store import UnreachableError, check_own_endpoint
from tests.launch.diagnostics.reports import H100, cpu_report, only, report
from tests.launch.processes import COMMAND_TIMEOUT_S


def test_checks_of_this_machine(tmp_path: Path) -> None:
    findings = [
        *machine.check_shared_memory(),
        *machine.check_open_files(),
        *machine.check_locked_memory(),
        *machine.check_disk(tmp_path / "a" / "b"),
    ]
    assert [finding.check for finding in findings] == ["shared memory", "open files", "disk"]
    assert all(finding.message and (finding.status == "pass") == (not finding.fix) for finding in findings)
    assert findings[-1].message.startswith(f"{tmp_path} (")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written() -> None:
    finding = only(list(machine.check_disk(Path("/proc"))))
    assert finding.status == "fail"
    assert "/proc must be writable" in finding.fix


def test_locked_memory_with_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert network.infiniband_mbps(tmp_path) == 400_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert "ulimit -l unlimited" in only(list(machine.check_locked_memory(tmp_path))).fix


def test_cpus() -> None:
    assert only(machine.cpu_findings([report(0, "n1")], 4)).status == "pass"
    assert "2 for 4 rank(s)" in only(machine.cpu_findings([cpu_report(0, "n1", quota=2.0)], 4)).message
    assert "OMP_NUM_THREADS=2" in only(machine.cpu_findings([cpu_report(0, "n1", omp_threads=4)], 2)).fix
    assert "--cpu-bind=none" in only(machine.cpu_findings([cpu_report(0, "n1", affinity=[3])], 1)).fix
    bound = [cpu_report(rank, "n1", rank, affinity=[rank]) for rank in range(4)]  # as SLURM binds tasks
    assert only(machine.cpu_findings(bound, 4)).message == "4 for 4 rank(s) of 1 thread(s)"


def test_compiled_extensions(tmp_path: Path) -> None:
    site_packages, build = tmp_path / "env", tmp_path / "cache" / "cpu_adam"
    build.mkdir(parents=True)
    assert not list(machine.check_extensions(build.parent, str(site_packages), "2.14.1"))
    (build / "build.ninja").write_text(
        f"cflags = -isystem {site_packages}/torch/include -isystem {site_packages}/torch/include/TH\n"
    )
    own = only(list(machine.check_extensions(build.parent, str(site_packages), "2.14.1")))
    assert own.status == "pass"
    other = only(list(machine.check_extensions(build.parent, "/other", "2.14.1")))
    assert other.status == "warn"
    assert str(site_packages) in other.message
    assert "TORCH_EXTENSIONS_DIR=" in other.fix


@pytest.mark.parametrize(
    ("torch_version", "hangs"),
    [("2.11.0", True), ("2.13.1+cu130", True), ("2.14.0", False), ("2.14.1+cpu", False), ("2.20.0", False)],
)
def test_a_lock_that_a_compilation_has_left(tmp_path: Path, torch_version: str, hangs: bool) -> None:
    """From 2.14 on the kernel releases it: nothing hangs."""
    build = tmp_path / "cpu_adam"
    build.mkdir()
    (build / "build.ninja").write_text("cflags = -isystem /env/torch/include\n")
    (build / "lock").touch()
    os.utime(build / "lock", (0, 0))
    finding = only(list(machine.check_extensions(tmp_path, "/env", torch_version)))
    assert finding.status == ("fail" if hangs else "pass")
    assert finding.fix == (f"rm {build / 'lock'}" if hangs else "")


def test_software_of_this_machine() -> None:
    info = software.software_info(
        {"NCCL_DEBUG": "INFO", "HOME": "/", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "0,1"}
    )
    assert {"python", "torch", "code"} <= info.versions.keys()
    assert info.environment == {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "2 device(s)"}


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        finding = only(list(network.check_port(port)))
        assert f"by process {os.getpid()}" in finding.message
        with pytest.raises(
            UnreachableError, match=rf"port {port} cannot be had .*; export MASTER_PORT={port + 1}"
        ):
            check_own_endpoint("localhost", port)
    assert only(list(network.check_port(port))).status == "pass"


def test_a_check_that_hangs_or_raises_is_a_finding() -> None:
    end = threading.Event()

    def hang() -> list[Finding]:
        end.wait(COMMAND_TIMEOUT_S)
        return []

    finding = only(run_check("disk", 0.1, hang))
    assert "no answer within 0.1 s" in finding.message
    assert not end.is_set(), "the check still hangs: nobody has waited for it"
    end.set()
    assert only(run_check("disk", COMMAND_TIMEOUT_S, lambda: [][1])).message.startswith("IndexError")


def test_gpus_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi: there is no GPU here."""
    smi = tmp_path / "nvidia-smi"
    apps = f"echo 'GPU-0, 999999, python'; echo 'GPU-1, {os.getpid()}, python'"
    smi.write_text(f"#!/bin/sh\ncase $1 in *apps*) {apps};; esac\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    busy = [GPU(index="0", uuid="GPU-0", name="H100", used_mib=40_000, total_mib=80_000), H100[1]]
    finding = only(list(gpus.check_gpus_in_use(busy, None)))
    assert finding.status == "fail"
    assert finding.message == "GPU 0: 40,000 of 80,000 MiB, 999999 (python)"
    assert only(list(gpus.check_gpus_in_use(H100, None))).status == "warn"
    assert only(list(gpus.check_gpus_in_use(busy, "1"))).message == "by nobody"
    assert not list(gpus.check_gpus_in_use([], None))
