"""The real command: what it prints, its trace, and how it fails."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.processes import COMMAND_TIMEOUT_S, LAUNCHER_VARIABLES, ROOT, TINY, rankzero

MINE = """
import cProfile  # imports Python's `profile`, not ours
import profile
from dataclasses import dataclass
from tests.launch.tiny import Fit

@dataclass(kw_only=True)
class Mine(Fit):
    kept: str = cProfile.Profile.__name__ + profile.Profile.__name__
"""


def profile(cwd: Path, *args: str, ranks: int = 0, code: int = 0) -> tuple[str, str]:
    """The stdout of the command in one line, and its stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    environment = {**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    line = rankzero("profile", *args, ranks=ranks)
    ended = subprocess.run(
        line,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * COMMAND_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return " ".join(ended.stdout.split()), ended.stderr


def shares(stdout: str, *names: str) -> list[float]:
    return [float(re.search(rf"{name} [\d.]+ ([\d.]+)%", stdout)[1]) for name in names]  # type: ignore[index]  # it fails then


def trace_in(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def test_a_single_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    stdout, stderr = profile(
        tmp_path, "recipe=./mine.py", "workers=0", "epochs=1", "profile_steps=2", "warmup_steps=1"
    )
    assert not stderr
    assert 99.8 < sum(shares(stdout, "computing", "outside of operations")) < 100.2
    assert 50 < sum(shares(stdout, "data", "forward", "backward", "optimizer step")) < 100.2
    assert re.search(
        r"most expensive operations of rank 0 calls ms share \W+aten::\w+ \d+ [\d.]+ [\d.]+% ", stdout
    )
    assert "communication" not in stdout
    (trace,) = (tmp_path / "runs" / "profile" / "mine").glob("*-single-1.json.gz")
    assert str(trace.relative_to(tmp_path)) in stdout
    events = trace_in(trace)
    assert {"ProfilerStep#1", "ProfilerStep#2", "phase: backward"} <= {event["name"] for event in events}
    assert len([event for event in events if event["name"] == "aten::addmm"]) == 4, "two layers, two steps"
    left = {path.name for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}
    assert left == {"mine.py", "runs", "profile", "mine", trace.name}, "nothing else is written"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_and_the_one_that_others_wait_for(tmp_path: Path, strategy: str) -> None:
    slow = (
        "recipe=tests.launch.tiny:Fit",
        "epochs=1",
        "batch_size=16",
        f"strategy={strategy}",
        "chaos=slow:rank=1,step=1",
    )
    stdout, _ = profile(tmp_path, *slow, "profile_steps=2", "warmup_steps=1", "trace=t.json.gz", ranks=2)
    assert shares(stdout, "exposed communication")[0] > 30, "half of the time, on one of two ranks"
    assert "waiting for a slower rank, rank 1" in stdout
    assert "gloo:all_reduce" in stdout
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]
    assert any(event["name"] == "gloo:all_reduce" for event in trace_in(tmp_path / "t.json.gz"))


@pytest.mark.slow
def test_mnist(tmp_path: Path) -> None:
    stdout, _ = profile(tmp_path, "recipe=mnist", "profile_steps=2", "warmup_steps=1", "trace=null")
    assert "aten::convolution_backward" in stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    stdout, stderr = profile(
        tmp_path,
        f"recipe={TINY}:Broken",
        "fail=raise",
        "batch_size=10",
        "epochs=1",
        "trace=t.json.gz",
        ranks=2,
        code=1,
    )
    ours = [line for line in stderr.splitlines() if line.startswith("rankzero: ")]
    assert len(ours) == 1
    assert re.search(r"rank 1 on .*, step 3, forward: LookupError: the shelf is empty", ours[0])
    assert not stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recipe=mnist", "profile_step=3"], "profile_step is not a key"),
        (["recipe=mnist", "profile_steps=0"], "profile_steps=0 must be 1 or more"),
        (["recipe=mnist", "trace=t.json"], "must end in .json.gz"),
        (["recipe=mnist", "trace=/proc/t/t.json.gz"], "name another file, or null"),
        (["recipe=mnist", "debug=true"], "debug= has no meaning here"),
        (["recipe=mnist", "micro_batch_size=auto"], "micro_batch_size=auto is found by a run"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    stdout, stderr = profile(tmp_path, *args, code=2)
    assert not stdout
    assert message in stderr
    assert stderr.startswith("rankzero: ")
    assert stderr.count("\n") == 1


def test_help_imports_no_torch(tmp_path: Path) -> None:
    spy = [sys.executable, "-X", "importtime", "-m", "launch", "profile", "recipe=mnist", "--help"]
    ended = subprocess.run(spy, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "yaml" in imported, "the spy sees nothing"
    assert not imported & {"torch", "numpy", "pydantic", "profile"}
    assert "profile_steps=5" in ended.stdout
    assert "batch_size=64" in ended.stdout
