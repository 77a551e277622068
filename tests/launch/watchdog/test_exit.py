"""After success a process ends normally: users' exit handlers run, and one that hangs does not keep it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.processes import (
    COMMAND_TIMEOUT_S,
    descendants,
    run_command,
    start_command,
    wait_for_command,
)

TRACKED = (f"recipe={Path(__file__).with_name('exit_handlers.py')}", "batch_size=8", "run_dir=run")
FOREVER = "exit_takes=1e6"


def exited(folder: Path) -> list[str]:
    """The ranks whose exit handlers have run."""
    return sorted(path.name for path in folder.glob("exited-*"))


def test_exit_handlers_run(tmp_path: Path) -> None:
    ended = run_command(*TRACKED, "steps=2", cwd=tmp_path)
    assert (ended.returncode, ended.messages) == (0, []), ended.stderr
    assert exited(tmp_path) == ["exited-0"]


@pytest.mark.slow
def test_an_exit_handler_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    ended = run_command(*TRACKED, "steps=2", FOREVER, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.messages == ["rankzero: exit handlers have not ended within 2 s"]
    assert exited(tmp_path) == ["exited-0"]


@pytest.mark.slow
def test_exit_handlers_run_on_all_ranks(tmp_path: Path) -> None:
    ended = run_command(*TRACKED, "steps=2", cwd=tmp_path, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert exited(tmp_path) == ["exited-0", "exited-1"]


@pytest.mark.slow
def test_ranks_whose_exit_handlers_hang_end_all_the_same(tmp_path: Path) -> None:
    ended = run_command(*TRACKED, "steps=2", FOREVER, cwd=tmp_path, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert exited(tmp_path) == ["exited-0", "exited-1"]
    assert not descendants(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [(), (FOREVER,)])
def test_exit_handlers_run_when_a_run_is_preempted(tmp_path: Path, hangs: tuple[str, ...]) -> None:
    process = start_command(*TRACKED, "steps=9999999", *hangs, cwd=tmp_path)
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    ended = wait_for_command(process)
    assert ended.returncode == 75, ended.stderr
    assert exited(tmp_path) == ["exited-0"]


def test_after_a_failure_nothing_waits_for_exit_handlers(tmp_path: Path) -> None:
    ended = run_command(*TRACKED, "steps=2", FOREVER, "chaos=oom:step=1", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert not exited(tmp_path)
