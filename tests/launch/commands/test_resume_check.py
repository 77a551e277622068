"""The command that proves that a killed run goes on: what it asks for, what it compares, and that it finds
what is wrong.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli.resolve import Settings
from launch.equivalence import subprocesses
from launch.equivalence.common import command, environment
from launch.equivalence.compare_metrics import Row, compared, deviation, judge, same_files, wrong_steps
from launch.equivalence.resume_check import agree, own_keys, plan
from launch.equivalence.subprocesses import Layout, last_step, run_process
from tests.launch.processes import FOLDER_VARIABLE, TINY, descendants

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
    """What `launch/commands/resume_check.py` prints."""
    found = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [*command("commands/resume_check.py", 1), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=found,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def agreed(*words: str) -> tuple[Settings, list[str]]:
    """What would be run."""
    own, others = own_keys(words)
    return agree(others, own)


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
    own, others = own_keys(words)
    assert (own.ranks, own.strategies, own.steps, own.all) == ([2, 4], ["single", "fsdp"], 40, True)
    assert others == ["recipe=gpt", "seed=3"]
    assert (own.every, own.half) == (10, 20)
    shortest, _ = own_keys(["recipe=gpt", "compare=4"])
    assert (shortest.every, shortest.half) == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ranks=1",), "ranks=1 must be a number of processes from 2"),
        (("compare=few",), "compare=few must be a number of steps from 4"),
        (("strategies=ddp,zeroo",), "'zeroo' is none of single, ddp"),
        (("all=yes",), "all=yes is not true or false"),
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
    own, _ = own_keys(["recipe=gpt", "strategies=single,ddp,fsdp"])
    single, ddp, fsdp = plan(own)
    assert (single.layout, single.readers) == (("single", 1), [("ddp", 2)])
    assert (ddp.layout, ddp.readers) == (("ddp", 2), [("fsdp", 1)])
    assert (fsdp.layout, fsdp.readers) == (("fsdp", 2), [("single", 1)])
    assert [writer.saving for writer in (single, ddp, fsdp)] == [[False], [True], [False]]


def test_all_is_every_pair() -> None:
    own, _ = own_keys(["recipe=gpt", "strategies=single,ddp", "ranks=2,4", "all=true"])
    single, ddp = plan(own)
    assert single.readers == [("ddp", 1), ("ddp", 2), ("ddp", 4)]
    assert ddp.readers == [("single", 1), ("ddp", 1), ("ddp", 4)]
    assert ddp.saving == [False, True]
    (alone,) = plan(own_keys(["recipe=gpt", "strategies=fsdp"])[0])
    assert (alone.saving, alone.readers) == ([False, True], [("fsdp", 1)])


# what is compared -------------------------------------------------------------------------------------------


def curve(*steps: int, **changes: float) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; `loss_7=...` says another loss in step 7."""
    lines: list[dict[str, Any]] = []
    for step in steps:
        line = {
            "step": step,
            "loss": 2.0 / step,
            "lr": 0.1,
            "grad_norm": 1.0 / 3 * step,
            "time": time.time() + step,
        }
        line |= {
            name.rpartition("_")[0]: value for name, value in changes.items() if name.endswith(f"_{step}")
        }
        lines += [line, {"step": step, "checkpoint/write": time.time()}]
    return [*lines, {"step": max(steps), "eval/loss": 0.5, "eval/confusion": [[1.0]]}]


WHOLE = curve(*range(1, 11))
DDP, FSDP = Layout("ddp", 2), Layout("fsdp", 1)


def judged(found: list[dict[str, Any]], reader: Layout = DDP, precision: str = "fp32") -> Row:
    row = Row(writer=DDP, reader=reader, resumed=5)
    judge(row, WHOLE, found, precision)
    return row


def test_equal_runs_are_equal() -> None:
    row = judged(curve(*range(1, 11)))
    assert (row.news, row.off_by, row.compared) == ([], 0.0, 5)
    row = judged(curve(*range(6, 11)), FSDP)
    assert (row.news, row.off_by, row.compared) == ([], 0.0, 5)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
def test_one_flipped_last_digit_is_found(name: str) -> None:
    value = next(line[name] for line in WHOLE if line["step"] == 7)
    row = judged(curve(*range(1, 11), **{f"{name}_7": math.nextafter(value, math.inf)}))
    assert len(row.news) == 1
    assert f"{name} of step 7 is" in row.news[0]
    assert "the first to differ" in row.news[0]
    assert (row.off_by > 0) == (name != "lr")


def test_another_layout_may_round_and_no_more() -> None:
    found = curve(*range(6, 11), loss_7=2.0 / 7 * (1 + 1e-6), grad_norm_9=3.0 * (1 + 9e-6))
    row = judged(found, FSDP)
    assert not row.news
    assert row.off_by == pytest.approx(9e-6, rel=1e-3)
    row = judged(curve(*range(6, 11), grad_norm_9=3.0 * (1 + 2e-5), loss_10=7.0), FSDP)
    assert "grad_norm of step 9" in row.news[0]
    assert not judged(curve(*range(6, 11), grad_norm_9=3.03), FSDP, "bf16").news


def test_nan_is_infinitely_far_from_a_number_and_equal_to_itself() -> None:
    assert deviation(math.nan, 1.0) == deviation(1.0, math.nan) == deviation(math.inf, 1.0) == math.inf
    assert deviation(math.nan, math.nan) == deviation(math.inf, math.inf) == 0.0
    for reader in (DDP, FSDP):
        row = judged(curve(*range(1 if reader == DDP else 6, 11), loss_8=math.nan), reader)
        assert "loss of step 8 is nan" in row.news[0]


def test_steps_must_be_there_once_each() -> None:
    assert "step 8, 9 missing" in judged(curve(*range(1, 8), 10)).news[0]
    assert "step 7 made twice" in judged(curve(*range(1, 8), 7, 8, 9, 10)).news[0]
    assert "step 1, 2, 3 ... too many" in judged(curve(*range(1, 11)), FSDP).news[0]
    assert wrong_steps([1, 2], [2, 1]) == "its steps are out of order"


def test_a_score_that_only_one_of_the_two_has_is_found() -> None:
    assert judged(WHOLE[:-1]).news == ["only one of the two has eval/loss of step 10"]


def test_a_run_that_does_not_repeat_itself_is_no_fault_of_resuming() -> None:
    assert "this run does not repeat itself" in judged(curve(*range(1, 11), loss_3=9.0)).news[0]


def test_rounding_that_the_run_itself_blows_up_is_named() -> None:
    grown = {f"loss_{step}": 2.0 / step * (1 + 6e-8 * 20 ** (step - 6)) for step in range(6, 11)}
    assert (
        "growing 20-fold a step: this run is that sensitive"
        in judged(curve(*range(6, 11), **grown), FSDP).news[0]
    )


def test_numbers_stand_in_order_of_steps() -> None:
    assert [number.step for number in compared(WHOLE[::-1], WHOLE, since=8) if number.name == "loss"] == [
        9,
        10,
    ]


def test_weights_are_compared_byte_by_byte(tmp_path: Path) -> None:
    for name, content in (("one", b"12345"), ("two", b"12345"), ("three", b"12344")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert not same_files(tmp_path / "one", tmp_path / "three")
    assert not same_files(tmp_path, tmp_path), "none at all is not the same"


# the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_leaves_nothing_alive(tmp_path: Path) -> None:
    words = (f"recipe={TINY}:Broken", "pause=0.1", "workers=1", "steps=1000", "log.every=1")
    run_dir = tmp_path / "run"
    marked = environment(2) | {FOLDER_VARIABLE: str(tmp_path)}
    ended = run_process(
        words, Layout("ddp", 2), run_dir=run_dir, environment=marked, kill_when=lambda: last_step(run_dir) > 2
    )
    assert (ended.how, ended.code, ended.trouble) == ("killed", -signal.SIGKILL, "")
    assert not descendants(tmp_path)


def test_a_life_that_makes_no_step_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "PATIENCE", 0.5)
    marked = environment(1) | {FOLDER_VARIABLE: str(tmp_path)}
    ended = run_process(
        [f"recipe={TINY}:Broken", "steps=1"],
        Layout("single", 1),
        run_dir=tmp_path / "run",
        environment=marked,
    )
    assert ended.trouble == "no step for 0.5 s, so it was killed"
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
    assert "the uninterrupted run: exit code 1, its error stands above" in printed
