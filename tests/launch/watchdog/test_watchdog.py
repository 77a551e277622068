"""The watchdog and the failure report: who died, who hangs where, who failed; reported once, in seconds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from launch.runtime.phase import Phase
from launch.runtime.rendezvous import heartbeat_key
from launch.runtime.world import World
from launch.watchdog import failure_report
from launch.watchdog.exception_report import from_exception
from launch.watchdog.failure_report import FailureReport
from launch.watchdog.heartbeats import FINISHED, Heartbeats
from launch.watchdog.watchdog import Watchdog
from tests.launch.processes import (
    TINY,
    CommandResult,
    descendants,
    run_command,
    start_command,
    wait_for_command,
)
from tests.launch.runs import metric_values, uninterrupted_losses

FIT = (f"recipe={TINY}:Fit", "batch_size=16", "steps=3000", "checkpoint.every=4", "run_dir=run", "workers=1")
HANG = "hang_timeout=20"
"""where a hang is meant: a start, on an idle machine 2 s, must not count as one on a busy machine"""


def run_with_fault(cwd: Path, chaos: str, *args: str, ranks: int = 2) -> CommandResult:
    """A run that the fault `chaos` meets, in step 9 if it does not say when; nothing may be left of it."""
    ended = run_command(
        *FIT, f"chaos={chaos}" + ("" if "step" in chaos else ",step=9"), *args, cwd=cwd, ranks=ranks
    )
    assert not descendants(cwd)
    assert len(ended.messages) == 1, ended.stderr
    return ended


def failure(cwd: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((cwd / "run" / "failure.json").read_text())
    return report


@pytest.mark.slow
def test_a_hang_says_who_is_where(tmp_path: Path) -> None:
    ended = run_with_fault(tmp_path, "stall:rank=1", HANG)
    assert ended.returncode == 1
    assert re.search(
        r"no rank has made progress for 20 s \(hang_timeout=20\); they are not in the same place",
        ended.messages[0],
    )
    assert re.search(r"^  rank 0: step 9, backward, ", ended.stderr, re.MULTILINE)
    assert re.search(
        r"^  rank 1: step 9, forward, fault_injection.py:\d+ in stall$", ended.stderr, re.MULTILINE
    )
    assert "in stall" in "".join(failure(tmp_path)["stacks"].values()), "the whole stacks are kept"


@pytest.mark.slow
def test_a_hang_of_a_single_process_is_found_too(tmp_path: Path) -> None:
    ended = run_with_fault(tmp_path, "stall:rank=0", HANG, ranks=0)
    assert ended.returncode == 1
    assert "no rank has made progress for 20 s" in ended.messages[0]


def check_killed(cwd: Path, rank: int) -> None:
    ended = run_with_fault(cwd, f"kill:rank={rank}")
    assert re.search(
        rf"rank {rank} on .* ended without a word; rank {1 - rank} is in step 9", ended.messages[0]
    ), ended.stderr
    assert failure(cwd)["lost"] == [rank]


@pytest.mark.slow
def test_rank_zero_is_killed_and_named(tmp_path: Path) -> None:
    check_killed(tmp_path, 0)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on_before_it(tmp_path: Path) -> None:
    check_killed(tmp_path, 1)
    again = run_command(*FIT, "steps=12", cwd=tmp_path)  # what two ranks do next, bit by bit, stands below
    assert again.returncode == 0, again.stderr
    assert re.search(r"continues run/checkpoints/step-0000000[48] at step [48]", again.stdout)


@pytest.mark.slow
def test_out_of_memory_comes_with_a_hint(tmp_path: Path) -> None:
    ended = run_with_fault(tmp_path, "oom:rank=1")
    assert re.search(r"rank 1 on .*, step 9, forward: .*can't allocate memory", ended.messages[0])
    assert "hint    micro_batch_size=auto" in ended.stderr


@pytest.mark.slow
def test_a_torn_checkpoint_costs_no_more_than_itself(tmp_path: Path) -> None:
    seldom = (
        "checkpoint.every=100"  # none is in flight when it strikes: that one would come after the torn one
    )
    run_with_fault(tmp_path, "torn_checkpoint:rank=1,step=290", seldom)
    again = run_command(*FIT, seldom, "steps=294", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    torn = re.search(
        r"(run/checkpoints/step-\d+)/rank-00000.safetensors has .* bytes of .*; going back to", again.stderr
    )
    assert torn
    assert (tmp_path / f"{torn[1]}.damaged").is_dir()


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on_by_itself(tmp_path: Path) -> None:
    args = [*FIT[:2], "steps=40", *FIT[3:]]
    ended = wait_for_command(
        start_command(*args, "chaos=kill:rank=1,step=9", cwd=tmp_path, ranks=2, restarts=2)
    )
    assert ended.returncode == 0, ended.stderr
    assert metric_values(tmp_path / "run") == uninterrupted_losses(tmp_path / "whole", *args, ranks=2)


# parts ------------------------------------------------------------------------------------------------------


def test_a_rank_is_lost_when_its_heartbeats_stop() -> None:
    store = HashStore()
    others = Heartbeats(2)
    for count in range(1, 4):
        store.set(heartbeat_key(0), f"{count} 7 5 forward")
        store.set(heartbeat_key(1), "1 1 4 data")
        others.read(store)
        time.sleep(1.0)  # rank 1 last beat 3 s ago, rank 0 one second ago
    assert others.silent_ranks(2.5) == [1]
    assert others.silent_ranks(600) == []
    assert others.seconds_without_progress() > 2.5, (
        "no rank has made progress: rank 0 beats, its step does not change"
    )
    assert (others.statuses[1].step, others.statuses[1].phase) == ("4", "data")
    store.set(heartbeat_key(1), FINISHED)
    others.read(store)
    assert others.silent_ranks(0.05) == [0], "a rank that has succeeded is not lost"


def of(error: Exception, **phase: Any) -> str:
    return failure_report.render(from_exception(error, World(rank=3), Phase(**phase)), Path("runs/a"))


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_block_names_rank_host_step_phase_line_and_batch() -> None:
    batch = [{"image": torch.zeros(4, 3, 8, 8), "label": torch.zeros(4, dtype=torch.int64)}]
    lines = of(raised(KeyError("a")), step=7, name="forward", batches=batch).splitlines()
    assert re.fullmatch(r"rankzero: rank 3 on \S+, step 7, forward: KeyError: 'a'", lines[0])
    assert re.fullmatch(rf'  File "{__file__}", line \d+, in raised', lines[1])
    assert lines[2] == "    raise error"
    assert lines[3] == "  batch   image 4 x 3 x 8 x 8 float32, label 4 int64"
    assert lines[4].startswith("  memory  ")
    assert lines[5] == f"  more in {Path('runs/a/failure.json')}"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "micro_batch_size=auto"),
        (OSError(28, "No space left on device"), "make room"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), "rankzero doctor"),
        (RuntimeError("CUDA error: device-side assert triggered"), "CUDA_LAUNCH_BLOCKING=1"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error"), "/dev/shm"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_what_often_helps_is_printed(error: Exception, hint: str) -> None:
    assert hint in of(error)
    assert "hint" not in of(ValueError("something else"))


def test_the_first_report_is_kept(tmp_path: Path) -> None:
    first, second = (FailureReport(kind="hang", message=text) for text in ("first", "second"))
    assert failure_report.write_once(first, tmp_path)
    assert not failure_report.write_once(second, tmp_path)
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == "first"
    assert failure_report.write_once(second, tmp_path / "no such folder"), (
        "a disk that cannot be written to hides nothing"
    )


def test_a_report_travels_and_an_older_one_is_read() -> None:
    report = from_exception(raised(KeyError("a")), World(rank=3), Phase(step=7, name="forward"))
    assert FailureReport.from_json(report.to_json()) == report
    keys = {"kind", "rank", "host", "device", "step", "phase", "time", "message"}
    assert keys == set(FailureReport(kind="lost", message="").to_dict())
    keys |= {"error", "frames", "traceback", "batch", "memory", "hint"}
    assert keys == set(report.to_dict()), "failure.json has the keys that it always had"
    older = FailureReport.from_dict({"kind": "hang", "message": "no progress", "unknown": 1})
    assert (older.kind, older.message, older.repeated) == ("hang", "no progress", None)


def test_the_first_published_report_ends_all_ranks() -> None:
    store = HashStore()
    first, second = (FailureReport(kind="lost", message=text) for text in ("first", "second"))
    ranks = [Watchdog(World(store=store), Phase(), hang_timeout=600.0) for _ in range(2)]
    for watchdog in ranks:
        watchdog.finished.set()  # the threads would end this process
    assert [watchdog.publish(first, store) for watchdog in ranks] == [first, first]
    assert [watchdog.published for watchdog in ranks] == [True, False], "the same text is no second report"
    assert ranks[1].publish(second, store) == first
    for watchdog in ranks:
        watchdog.close()
    beats = Heartbeats(1)
    beats.read(store)
    assert beats.statuses[0].phase == "end"
