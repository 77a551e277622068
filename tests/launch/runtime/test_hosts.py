"""The real command on two hosts that are namespaces of this machine: a start, a host that does not come, a
cable that is cut, a host that dies, and a run that goes on with the host that is left.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.hosts import Host, launcher_env, start_on_host, two_hosts
from tests.launch.processes import (
    COMMAND_TIMEOUT_S,
    PATIENCE,
    RUN_SCRIPT,
    TINY,
    CommandResult,
    wait_for_command,
)
from tests.launch.runs import metric_values, uninterrupted_losses

pytestmark = pytest.mark.slow

STEPS, HANG, PORT = 28, 20, 29500
ARGS = (
    *(
        f"recipe={TINY}:Broken",
        f"steps={STEPS}",
        "batch_size=16",
        "micro_batch_size=8",
        "workers=1",
        "run_dir=run",
    ),
    *("checkpoint.every=4", "log.every=1", f"start_timeout={PATIENCE * 6:g}", f"hang_timeout={HANG}"),
)
SLOWLY = "pause=0.2"
"""slow enough to fail in mid-run"""


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of a single process that nothing happened to."""
    return uninterrupted_losses(tmp_path_factory.mktemp("whole") / "run", *ARGS)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def without_launcher(hosts: Sequence[Host], cwd: Path, *args: str) -> list[subprocess.Popen[str]]:
    """A rank on each of `hosts`, of a run on two."""
    return [
        start_on_host(host, [str(RUN_SCRIPT), *ARGS, *args], cwd, launcher_env(rank, "n1", PORT))
        for rank, host in enumerate(hosts)
    ]


def torchrun(
    hosts: Sequence[Host], cwd: Path, *args: str, nodes: str, conf: str
) -> list[subprocess.Popen[str]]:
    """A torchrun on each of `hosts`; n1 holds their rendezvous."""
    elastic = (
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        "--nproc_per_node=1",
        "--max-restarts=3",
        "--rdzv_backend=c10d",
    )
    return [
        start_on_host(
            host,
            [
                *(*elastic, f"--rdzv_endpoint=n1:{PORT}", f"--local-addr={host.address}"),
                *(
                    f"--rdzv_conf=is_host={str(host.name == 'n1').lower()},{conf}",
                    str(RUN_SCRIPT),
                    *ARGS,
                    *args,
                ),
            ],
            cwd,
            {"GLOO_SOCKET_IFNAME": "eth0"},
        )
        for host in hosts
    ]


def in_step(step: int, cwd: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until a run has made `step`, and a checkpoint before it is whole."""
    until = time.monotonic() + COMMAND_TIMEOUT_S
    run_dir = cwd / "run"
    while (
        not (run_dir / "metrics.jsonl").exists()
        or len(metric_values(run_dir)) < step
        or not list(run_dir.glob("checkpoints/step-*"))
    ):
        assert all(process.poll() is None for process in processes), [
            wait_for_command(process).stderr for process in processes
        ]
        assert time.monotonic() < until
        time.sleep(0.02)


def ends(
    hosts: Sequence[Host], processes: Sequence[subprocess.Popen[str]], within: float = COMMAND_TIMEOUT_S
) -> list[CommandResult]:
    """How they end, and after how many seconds from now: all of them in time, with nothing left on the
    hosts.
    """
    since, ended = time.monotonic(), dict[int, float]()
    while len(ended) < len(processes) and time.monotonic() - since < within:
        ended |= {
            number: time.monotonic() - since
            for number, process in enumerate(processes)
            if number not in ended and process.poll() is not None
        }
        time.sleep(0.02)
    left = command_lines_on(hosts)
    while left and time.monotonic() - since < within:  # a data worker looks for its parent now and then
        time.sleep(0.1)
        left = command_lines_on(hosts)
    for host in hosts:
        host.kill()  # else whoever has inherited the pipes would keep them open
    done = [
        replace(wait_for_command(process), seconds=ended.get(number, within))
        for number, process in enumerate(processes)
    ]
    assert not left, (left, done)
    return done


def command_lines_on(hosts: Sequence[Host]) -> list[str]:
    """Of all processes that run on the hosts."""
    lines = []
    for process in (process for host in hosts for process in host.processes()):
        with suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    return lines


def failure(cwd: Path, since: float) -> dict[str, Any]:
    """What failure.json says; `after` are the seconds that it took."""
    report: dict[str, Any] = json.loads((cwd / "run" / "failure.json").read_text())
    return {**report, "after": report["time"] - since}


def goes_on(hosts: Sequence[Host], cwd: Path, losses: Sequence[float]) -> None:
    """The same command continues the run from its checkpoint; in the end the losses are those of a run that
    nobody touched.
    """
    done = ends(hosts, without_launcher(hosts, cwd))
    assert [ended.returncode for ended in done] == [0, 0], done
    assert re.search(r"continues run/checkpoints/step-\d+ at step \d+", done[0].stdout)
    assert metric_values(cwd / "run") == pytest.approx(losses, rel=1e-5)


def test_two_hosts_train_as_one_process(tmp_path: Path, hosts: list[Host], losses: list[float]) -> None:
    done = ends(hosts, torchrun(hosts, tmp_path, nodes="2", conf=f"join_timeout={COMMAND_TIMEOUT_S:g}"))
    assert [ended.returncode for ended in done] == [0, 0], done
    assert "2 rank(s) on 2 node(s)" in done[0].stdout
    assert not done[1].stdout
    assert metric_values(tmp_path / "run") == pytest.approx(losses, rel=1e-5)


def test_a_host_that_does_not_come_is_named(tmp_path: Path, hosts: list[Host]) -> None:
    (ended,) = ends(hosts, without_launcher(hosts[:1], tmp_path, "start_timeout=3"))
    assert (ended.returncode, len(ended.messages)) == (1, 1), ended.stderr
    assert "expected 2 ranks, after 3 s saw 0 from n1; missing: rank 1." in ended.messages[0]


def test_torchrun_waits_for_a_host_as_long_as_it_is_asked_to(tmp_path: Path, hosts: list[Host]) -> None:
    """Its rendezvous comes before any rank is started: join_timeout (10 minutes unless given) is its own, and
    it names nobody.
    """
    (ended,) = ends(hosts, torchrun(hosts[:1], tmp_path, nodes="2", conf="join_timeout=5"))
    assert ended.returncode == 1
    assert not ended.messages
    assert "RendezvousTimeoutError" in ended.stderr


def test_a_cable_that_is_cut(tmp_path: Path, hosts: list[Host], losses: list[float]) -> None:
    """No connection ends. The side of rank zero sees that nothing moves, the other side that the store does
    not answer.

    (A torchrun on the far side waits for the store of its rendezvous until the cable is in again.)
    """
    running = without_launcher(hosts, tmp_path, SLOWLY)
    in_step(9, tmp_path, running)
    hosts[1].plug(False)
    since = time.time()
    first, second = ends(hosts, running)
    report = failure(tmp_path, since)
    assert (first.returncode, second.returncode) == (1, 1)
    assert report["after"] < PATIENCE * HANG, "by the watchdog, not by a timeout of gloo"
    assert any(re.match("rank 1: not heard from on n2", line) for line in report["ranks"]), report
    hosts[1].plug(True)
    goes_on(hosts, tmp_path, losses)


def test_a_host_that_dies(tmp_path: Path, hosts: list[Host]) -> None:
    running = without_launcher(hosts, tmp_path, SLOWLY)
    in_step(9, tmp_path, running)
    hosts[1].kill()
    since = time.time()
    first, _ = ends(hosts, running)
    report = failure(tmp_path, since)
    assert (first.returncode, report["lost"]) == (1, [1])
    assert report["after"] < PATIENCE * 15, "by the heartbeats, not by a timeout of gloo"
    assert (
        "rank 1 on n2, last seen in step" in first.messages[0]
    )  # how such a run goes on stands above and below


def test_the_host_of_rank_zero_dies(tmp_path: Path, hosts: list[Host], losses: list[float]) -> None:
    running = without_launcher(hosts, tmp_path, SLOWLY)
    in_step(9, tmp_path, running)
    hosts[0].kill()
    since = time.time()
    _, second = ends(hosts, running)
    report = failure(tmp_path, since)
    assert second.returncode == 1
    assert report["after"] < PATIENCE * 15, "by the heartbeats, not by a timeout of gloo"
    assert "lost the connection to the host of rank zero" in second.messages[0]
    goes_on(hosts, tmp_path, losses)


def test_the_host_that_is_left_goes_on_by_itself(
    tmp_path: Path, hosts: list[Host], losses: list[float]
) -> None:
    conf = f"join_timeout={COMMAND_TIMEOUT_S:g},last_call_timeout=3,keep_alive_interval=1"
    running = torchrun(hosts, tmp_path, SLOWLY, nodes="1:2", conf=conf)
    in_step(9, tmp_path, running)
    hosts[1].kill()
    first, _ = ends(hosts, running)
    assert first.returncode == 0
    assert "rank 1 on n2, last seen in step" in first.stderr
    assert "1 rank(s) on 1 node(s)" in first.stdout
    assert metric_values(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
