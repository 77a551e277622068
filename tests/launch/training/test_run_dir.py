"""Which run directory: the same for all attempts of a run, and none for a run that only fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli.resolve import resolve
from launch.runtime.world import World
from launch.training.run_dir import default_run_dir, find_run_dir, refuse_to_loop, start_run_dir
from launch.watchdog import failure_report
from launch.watchdog.failure_report import FailureReport
from tests.launch.processes import COMMAND_TIMEOUT_S, ROOT, TINY


def failed(run_dir: Path, step: int = 5, message: str = "the shelf is empty") -> dict[str, Any]:
    """The failure of an attempt; what it has left in failure.json."""
    failure_report.write_once(
        FailureReport(kind="exception", step=step, error="LookupError", message=message), run_dir
    )
    left: dict[str, Any] = json.loads((run_dir / "failure.json").read_text())
    return left


def test_a_run_that_fails_in_the_same_way_again_and_again_is_not_started_again(tmp_path: Path) -> None:
    settings = resolve([f"recipe={TINY}:Fit", "steps=1", f"run_dir={tmp_path / 'run'}"], World())
    for attempt in (1, 2, 3):
        assert find_run_dir(settings) == tmp_path / "run"
        start_run_dir(tmp_path / "run", settings, World())
        assert failed(tmp_path / "run")["repeated"] == attempt
    with pytest.raises(
        ValueError,
        match=r"the last 3 attempts of run_dir=.* all failed at step 5 with LookupError: the shelf .* remove",
    ):
        find_run_dir(settings)
    (tmp_path / "run" / "failure.json").unlink()
    assert find_run_dir(settings) == tmp_path / "run"


def test_another_failure_is_not_a_loop(tmp_path: Path) -> None:
    settings = resolve([f"recipe={TINY}:Fit", "steps=1", f"run_dir={tmp_path}"], World())
    for step in (5, 6, 7, 8):  # it comes further each time
        start_run_dir(tmp_path, settings, World())
        assert failed(tmp_path, step)["repeated"] == 1
    refuse_to_loop(tmp_path)
    refuse_to_loop(tmp_path / "nowhere")


def test_a_rank_that_torchrun_restarts_finds_its_run_again(tmp_path: Path) -> None:
    def run_dir_of_attempt(number: int, agent: str = "none_xyz", **more: str) -> Path:
        path = f"/tmp/torchelastic_abc/{agent}/attempt_{number}/0/error.json"
        return default_run_dir(
            tmp_path, {"TORCHELASTIC_ERROR_FILE": path, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", **more}
        )

    first = run_dir_of_attempt(0)
    first.mkdir()
    time.sleep(1.1)  # the name holds the second
    assert run_dir_of_attempt(1) == first
    assert run_dir_of_attempt(0, "none_uvw").name != first.name
    with pytest.raises(ValueError, match="--max-restarts on several nodes needs run_dir="):
        run_dir_of_attempt(1, WORLD_SIZE="4", TORCHELASTIC_MAX_RESTARTS="3")
    assert run_dir_of_attempt(1, WORLD_SIZE="4", TORCHELASTIC_MAX_RESTARTS="0") == first


def test_two_runs_that_start_in_the_same_second_do_not_share_a_directory() -> None:
    code = "from pathlib import Path; from launch.training.run_dir import default_run_dir; "
    code += "print(default_run_dir(Path('runs'), {}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = {process.communicate(timeout=COMMAND_TIMEOUT_S)[0] for process in both}
    assert len(names) == 2
    assert all(re.fullmatch(r"runs/\d{8}-\d{6}-[0-9a-f]{4}\n", name) for name in names)
