"""A run that fails says why, once, and ends; one that is interrupted ends cleanly. Real processes under
torchrun.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch.processes import (
    COMMAND_TIMEOUT_S,
    PATIENCE,
    ROOT,
    TINY,
    CommandResult,
    descendants,
    run_command,
    start_command,
    wait_for_command,
)
from tests.launch.runs import metric_values


def fails(cwd: Path, fail: str, *args: str, recipe: str = "Broken", ranks: int = 2) -> CommandResult:
    return run_command(
        f"recipe={TINY}:{recipe}",
        f"fail={fail}",
        "run_dir=run",
        "batch_size=10",
        "epochs=2",
        "log.every=1",
        *args,
        cwd=cwd,
        ranks=ranks,
    )


def failure(cwd: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((cwd / "run" / "failure.json").read_text())
    return report


def losses(cwd: Path) -> list[float]:
    return metric_values(cwd / "run")


@pytest.mark.slow
def test_an_exception_on_one_rank_is_reported_once_and_ends_the_job(tmp_path: Path) -> None:
    ended = fails(tmp_path, "raise")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(r"rank 1 on .*, step 3, forward: LookupError: the shelf is empty", ended.messages[0])
    ours, _, of_torchrun = ended.stderr.partition("Root Cause (first observed failure)")
    assert ours.count('raise LookupError("the shelf is empty")') == 1, "the line that raised, once"
    assert "batch   5 x 5 float32, 5 x 1 float32" in ours
    assert "step 3, forward: LookupError: the shelf is empty" in of_torchrun, (
        "its report names the cause as well"
    )
    report = failure(tmp_path)
    assert (report["rank"], report["step"], report["error"]) == (1, 3, "LookupError")
    failed_after = time.time() - report["time"]
    assert failed_after < 30, "from the failure to the end of the job"
    assert losses(tmp_path), "the steps before are on record"


def test_an_exception_without_launcher_is_reported_once(tmp_path: Path) -> None:
    ended = fails(tmp_path, "raise", "fail_rank=0", ranks=0)
    assert (ended.returncode, len(ended.messages)) == (1, 1)
    assert ended.stderr.count('raise LookupError("the shelf is empty")') == 1
    assert "in loss\n" in ended.stderr
    assert str(ROOT / "launch") not in ended.stderr, "from the user's own code on"
    assert failure(tmp_path)["step"] == 3


NCCL_DESTROY = Path(__file__).with_name("nccl_destroy.py")
"""leaving the process group waits for all ranks"""


def fails_as_with_nccl(cwd: Path, fail: str, *args: str) -> CommandResult:
    common = ("batch_size=8", "steps=8", "log.every=5", f"hang_timeout={PATIENCE * 20:g}", "run_dir=run")
    return run_command(
        f"recipe={NCCL_DESTROY}",
        "strategy=ddp",
        f"fail={fail}",
        *common,
        *args,
        cwd=cwd,
        ranks=2,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("fail", "args"), [("forward", ()), ("evaluate", ("eval.every=4",))])
def test_an_exception_is_reported_where_leaving_the_group_waits_for_all(
    tmp_path: Path, fail: str, args: tuple[str, ...]
) -> None:
    """Else the rank that failed would wait for the others, which wait for it in a collective; reported as a
    hang.
    """
    ended = fails_as_with_nccl(tmp_path, fail, *args)
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(rf"rank 1 on .*, step 4, {fail}: LookupError: the shelf is empty", ended.messages[0])


@pytest.mark.slow
def test_numbers_are_written_after_a_failure_without_asking_the_others(tmp_path: Path) -> None:
    ended = fails_as_with_nccl(tmp_path, "forward", "fail_rank=0")
    assert failure(tmp_path)["error"] == "LookupError", ended.stderr
    assert len(losses(tmp_path)) == 3, "log.every=5: they were pending"


@pytest.mark.slow
def test_ranks_restart_where_leaving_the_group_waits_for_all(tmp_path: Path) -> None:
    ended = fails_as_with_nccl(tmp_path, "memory", "micro_batch_size=auto")
    assert "all ranks restart with 2" in ended.messages[0], ended.stderr


@pytest.mark.slow
def test_a_failed_export_ends_all_where_leaving_the_group_waits_for_all(tmp_path: Path) -> None:
    ended = fails_as_with_nccl(tmp_path, "export")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(r"rank 0 on .*, export: ", ended.messages[0])


@pytest.mark.slow
def test_ctrl_c_ends_where_leaving_the_group_waits_for_all(tmp_path: Path) -> None:
    ended = fails_as_with_nccl(tmp_path, "interrupt")
    assert "exitcode  : 130" in ended.stderr
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_a_run_that_succeeds_leaves_the_group(tmp_path: Path) -> None:
    ended = fails_as_with_nccl(tmp_path, "no")
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "left-the-group").iterdir())) == 2


@pytest.mark.slow
def test_the_next_life_of_a_failed_run_forgets_the_failure(tmp_path: Path) -> None:
    fails(tmp_path, "raise", "fail_rank=0", "checkpoint.every=2", ranks=0)
    ended = fails(tmp_path, "no", "checkpoint.every=2", ranks=0)
    assert ended.returncode == 0, ended.stderr
    assert "at step 2" in ended.stdout
    assert not (tmp_path / "run" / "failure.json").exists()


@pytest.mark.slow
def test_a_nan_loss_names_step_rank_and_module(tmp_path: Path) -> None:
    ended = fails(tmp_path, "nan")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(
        r"at step 3: micro-batch 0 of rank 1, first in module model\.0 \(Poisonable\)", ended.messages[0]
    )
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in ended.stderr, (
        "a message that says it all needs no traceback"
    )
    assert failure(tmp_path)["step"] == 3
    assert set(re.findall(r"exitcode *: (-?\d+)", ended.stderr)) <= {"1", "-15"}


@pytest.mark.slow
def test_a_nan_loss_that_is_read_an_interval_later_names_step_and_parameter(tmp_path: Path) -> None:
    ended = fails(tmp_path, "nan", "log.every=5")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(
        r"the loss is nan at step 3; first bad parameter by step 5: model\.0\.weight", ended.messages[0]
    )
    assert [loss == loss for loss in losses(tmp_path)] == [True, True, False, False, False]
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "nothing spoilt was saved"


@pytest.mark.slow
def test_a_recipe_may_leave_nan_steps_out_on_all_ranks(tmp_path: Path) -> None:
    ended = fails(tmp_path, "nan", recipe="Forgiving")
    assert ended.returncode == 0, ended.stderr
    found = losses(tmp_path)
    assert len(found) == 10
    assert [step for step, loss in enumerate(found, 1) if loss != loss] == [3]


@pytest.mark.slow
def test_a_nan_gradient_of_a_finite_loss_names_the_parameter(tmp_path: Path) -> None:
    ended = fails(tmp_path, "gradient")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(
        r"gradient norm is nan at step 3, the loss being finite; .* model\.0\.weight", ended.messages[0]
    )
    assert failure(tmp_path)["step"] == 3


@pytest.mark.slow
def test_what_fails_on_all_ranks_before_the_first_step_is_reported_once(tmp_path: Path) -> None:
    ended = fails(tmp_path, "no", recipe="Unbuilt")
    assert ended.returncode == 1
    assert len(ended.messages) == 1, ended.stderr
    ours, *_ = ended.stderr.partition("ChildFailedError")  # torchrun's own report comes after it
    assert ours.count('raise RuntimeError("no such layer")') == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    process = busy(tmp_path)
    next(worker for worker in descendants(tmp_path) if worker.environ().get("RANK") == "1").kill()
    killed = time.monotonic()
    ended = wait_for_command(process)
    assert ended.returncode == 1
    assert time.monotonic() - killed < PATIENCE * 15, "heartbeats find it, no timeout of minutes"
    assert len(ended.messages) == 1, ended.stderr
    assert re.search(r"rank 1 on .*, last seen in step \d+, \w+: ended without a word", ended.messages[0])
    assert failure(tmp_path)["lost"] == [1]
    assert not descendants(tmp_path)


def busy(cwd: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """A run that goes on for minutes, after its first steps."""
    process = start_command(
        f"recipe={TINY}:Broken",
        "pause=0.05",
        "run_dir=run",
        "batch_size=10",
        "steps=9999",
        "log.every=1",
        cwd=cwd,
        ranks=ranks,
    )
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not (cwd / "run" / "metrics.jsonl").exists() or len(losses(cwd)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process
