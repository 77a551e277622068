"""The command that proves that a killed run goes on: what it asks for, what it compares, and that it finds
what is wrong.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from launch.cli.command import read_arguments
from launch.cli.resolve import Settings
from launch.commands.resume_check import ResumeCheckOptions, extent_of
from launch.equivalence import subprocesses
from launch.equivalence.check_resume import check_arguments
from launch.equivalence.kill_plan import Extent, plan_kills
from launch.equivalence.observed_run import last_logged_step
from launch.equivalence.subprocesses import RankLayout, run_process, subprocess_environment
from tests.launch.processes import FOLDER_VARIABLE, TINY, descendants, rankzero

FIT = (f"recipe={TINY}:Fit", "workers=0", "batch_size=16")

FORGETFUL = """
from dataclasses import dataclass

import torch

from tests.launch.tiny import Fit


@dataclass(kw_only=True)
class Forgetful(Fit):
    def __post_init__(self):
        self.calls = 0

    def loss(self, model, batch):
        self.calls += torch.is_grad_enabled()
        return super().loss(model, batch) * (1 + 1e-6 * self.calls)
"""
"""the weight of its loss follows from a counter that no checkpoint knows of"""


def check(*words: str, cwd: Path, expect: int) -> str:
    """What `rankzero resume_check` prints."""
    found = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        rankzero("resume_check", *words),
        capture_output=True,
        text=True,
        timeout=600,
        env=found,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def extent(*words: str) -> tuple[Extent, list[str]]:
    """How much would be checked, and the run's own arguments."""
    return extent_of(read_arguments(words, ResumeCheckOptions, takes_run=True))


def agreed(*words: str) -> tuple[Settings, list[str]]:
    """What would be run."""
    own, others = extent(*words)
    return check_arguments(others, own)


# what is asked for ------------------------------------------------------------------------------------------


def test_own_keys_are_taken_out_and_what_the_check_sets_itself() -> None:
    words = [
        "recipe=gpt",
        "ranks=2,4",
        "strategies=single,fsdp",
        "compare=40",
        "all=true",
        "steps=9",
        "strategy=ddp",
        "seed=3",
    ]
    own, others = extent(*words)
    assert (own.ranks, own.strategies, own.steps, own.all) == ([2, 4], ["single", "fsdp"], 40, True)
    assert others == ["recipe=gpt", "seed=3"]
    assert (own.every, own.half) == (10, 20)
    shortest, _ = extent("recipe=gpt", "compare=4")
    assert (shortest.every, shortest.half) == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ranks=1",), r"ranks=\[1\]: each must be 2 or more \(default: \[2\]\)"),
        (("compare=few",), r"compare=few is not int \(default: 20\)"),
        (("compare=3",), "compare=3 must be 4 or more"),
        (("strategies=ddp,zeroo",), "'zeroo' is none of single, ddp"),
        (("all=yes",), r"all=yes is not true\|false"),
        (("resume=none",), "debug= and resume= have no meaning here"),
        (("debug=true",), "debug= and resume= have no meaning here"),
        (("batch_size=15",), "batch_size=15 cannot be cut into"),
        (("fsdp.nothing=1", "strategies=fsdp"), "fsdp.nothing is not a key"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreed(*FIT, *words)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    printed = check(*FIT, "strategies=ddp,zeroo", cwd=tmp_path, expect=2)
    assert printed.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_all_layouts_see_the_same_micro_batches() -> None:
    settings, words = agreed(*FIT, "ranks=2,4")
    assert "micro_batch_size=4" in words
    assert settings.config.micro_batch_size is None, "it was not the user who said it"
    assert "micro_batch_size=2" in agreed(*FIT, "ranks=2,4", "micro_batch_size=2")[1]


def test_each_strategy_is_killed_and_read_by_the_next_on_other_ranks() -> None:
    own, _ = extent("recipe=gpt", "strategies=single,ddp,fsdp")
    single, ddp, fsdp = plan_kills(own)
    assert (single.layout, single.readers) == (("single", 1), [("ddp", 2)])
    assert (ddp.layout, ddp.readers) == (("ddp", 2), [("fsdp", 1)])
    assert (fsdp.layout, fsdp.readers) == (("fsdp", 2), [("single", 1)])
    assert [plan.kills_in_save for plan in (single, ddp, fsdp)] == [[False], [True], [False]]


def test_all_is_every_pair() -> None:
    own, _ = extent("recipe=gpt", "strategies=single,ddp", "ranks=2,4", "all=true")
    single, ddp = plan_kills(own)
    assert single.readers == [("ddp", 1), ("ddp", 2), ("ddp", 4)]
    assert ddp.readers == [("single", 1), ("ddp", 1), ("ddp", 4)]
    assert ddp.kills_in_save == [False, True]
    (alone,) = plan_kills(extent("recipe=gpt", "strategies=fsdp")[0])
    assert (alone.kills_in_save, alone.readers) == ([False, True], [("fsdp", 1)])


# the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_leaves_nothing_alive(tmp_path: Path) -> None:
    words = (f"recipe={TINY}:Broken", "pause=0.1", "workers=1", "steps=1000", "log.every=1")
    run_dir = tmp_path / "run"
    marked = subprocess_environment(2) | {FOLDER_VARIABLE: str(tmp_path)}
    ended = run_process(
        words,
        RankLayout("ddp", 2),
        run_dir=run_dir,
        environment=marked,
        kill_when=lambda: last_logged_step(run_dir) > 2,
    )
    assert (ended.reason, ended.exit_code, ended.problem) == ("killed", -signal.SIGKILL, "")
    assert not descendants(tmp_path)


def test_a_run_that_makes_no_step_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "HANG_TIMEOUT_S", 0.5)
    marked = subprocess_environment(1) | {FOLDER_VARIABLE: str(tmp_path)}
    ended = run_process(
        [f"recipe={TINY}:Broken", "steps=1"],
        RankLayout("single", 1),
        run_dir=tmp_path / "run",
        environment=marked,
    )
    assert ended.problem == "no step for 0.5 s, so it was killed"
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_our_recipe_passes_and_nothing_is_left(tmp_path: Path) -> None:
    printed = check(*FIT, "strategies=fsdp", f"run_dir={tmp_path / 'runs'}", cwd=tmp_path, expect=0)
    assert len([line for line in printed.splitlines() if line.rstrip().endswith(" pass")]) == 3, (
        "killed twice; on other ranks"
    )
    assert "3 of 3 passed" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if "x 2" in line)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_does_not_resume_exactly_is_caught(tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    words = ("recipe=forgetful.py", "workers=0", "batch_size=16", "strategies=single", "compare=12")
    printed = check(*words, f"run_dir={tmp_path}", cwd=tmp_path, expect=1)
    assert printed.count("FAIL") == 2
    assert "the first to differ" in printed
    assert "not the same bytes" in printed
    (kept,) = tmp_path.glob("resume_check-*")
    assert str(kept) in printed
    assert (kept / "single-whole" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_dies_shows_its_own_error(tmp_path: Path) -> None:
    words = (
        f"recipe={TINY}:Broken",
        "fail=raise",
        "fail_rank=0",
        "workers=0",
        "batch_size=16",
        "strategies=single",
    )
    printed = check(*words, cwd=tmp_path, expect=1)
    assert "LookupError: the shelf is empty" in printed
    assert "the uninterrupted run: exit code 1, its error is printed above" in printed
