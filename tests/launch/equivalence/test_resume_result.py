"""A resumed run against the one that was not interrupted: what passes, and what is wrong in which words."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from launch.equivalence.compare_metrics import describe_wrong_steps, pair_numbers, same_weights
from launch.equivalence.resume_result import ResumeResult, compare_resumed
from launch.equivalence.subprocesses import RankLayout
from launch.equivalence.tolerances import relative_deviation


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
DDP, FSDP = RankLayout("ddp", 2), RankLayout("fsdp", 1)


def compared(actual: list[dict[str, Any]], reader: RankLayout = DDP, precision: str = "fp32") -> ResumeResult:
    result = ResumeResult(writer=DDP, reader=reader, resumed_from=5)
    compare_resumed(result, WHOLE, actual, precision)
    return result


def test_equal_runs_are_equal() -> None:
    result = compared(curve(*range(1, 11)))
    assert (result.problems, result.max_deviation, result.compared_steps) == ([], 0.0, 5)
    result = compared(curve(*range(6, 11)), FSDP)
    assert (result.problems, result.max_deviation, result.compared_steps) == ([], 0.0, 5)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
def test_one_flipped_last_digit_is_found(name: str) -> None:
    value = next(line[name] for line in WHOLE if line["step"] == 7)
    result = compared(curve(*range(1, 11), **{f"{name}_7": math.nextafter(value, math.inf)}))
    assert len(result.problems) == 1
    assert f"{name} of step 7 is" in result.problems[0]
    assert "the first to differ" in result.problems[0]
    assert (result.max_deviation > 0) == (name != "lr")


def test_another_layout_may_round_and_no_more() -> None:
    actual = curve(*range(6, 11), loss_7=2.0 / 7 * (1 + 1e-6), grad_norm_9=3.0 * (1 + 9e-6))
    result = compared(actual, FSDP)
    assert not result.problems
    assert result.max_deviation == pytest.approx(9e-6, rel=1e-3)
    result = compared(curve(*range(6, 11), grad_norm_9=3.0 * (1 + 2e-5), loss_10=7.0), FSDP)
    assert "grad_norm of step 9" in result.problems[0]
    assert not compared(curve(*range(6, 11), grad_norm_9=3.03), FSDP, "bf16").problems


def test_nan_is_infinitely_far_from_a_number_and_equal_to_itself() -> None:
    assert (
        relative_deviation(math.nan, 1.0)
        == relative_deviation(1.0, math.nan)
        == relative_deviation(math.inf, 1.0)
        == math.inf
    )
    assert relative_deviation(math.nan, math.nan) == relative_deviation(math.inf, math.inf) == 0.0
    for reader in (DDP, FSDP):
        result = compared(curve(*range(1 if reader == DDP else 6, 11), loss_8=math.nan), reader)
        assert "loss of step 8 is nan" in result.problems[0]


def test_steps_must_be_there_once_each() -> None:
    assert "step 8, 9 missing" in compared(curve(*range(1, 8), 10)).problems[0]
    assert "step 7 made twice" in compared(curve(*range(1, 8), 7, 8, 9, 10)).problems[0]
    assert "step 1, 2, 3 ... too many" in compared(curve(*range(1, 11)), FSDP).problems[0]
    assert describe_wrong_steps([1, 2], [2, 1]) == "its steps are out of order"


def test_a_score_that_only_one_of_the_two_has_is_found() -> None:
    assert compared(WHOLE[:-1]).problems == ["only one of the two has eval/loss of step 10"]


def test_a_run_that_does_not_repeat_itself_is_no_fault_of_resuming() -> None:
    assert "this run does not repeat itself" in compared(curve(*range(1, 11), loss_3=9.0)).problems[0]


def test_rounding_that_the_run_itself_blows_up_is_named() -> None:
    grown = {f"loss_{step}": 2.0 / step * (1 + 6e-8 * 20 ** (step - 6)) for step in range(6, 11)}
    assert (
        "growing 20-fold a step: this run amplifies rounding"
        in compared(curve(*range(6, 11), **grown), FSDP).problems[0]
    )


def test_numbers_stand_in_order_of_steps() -> None:
    assert [
        number.step for number in pair_numbers(WHOLE[::-1], WHOLE, after_step=8) if number.name == "loss"
    ] == [
        9,
        10,
    ]


def test_weights_are_compared_byte_by_byte(tmp_path: Path) -> None:
    for name, content in (("one", b"12345"), ("two", b"12345"), ("three", b"12344")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert not same_weights(tmp_path / "one", tmp_path / "three")
    assert not same_weights(tmp_path, tmp_path), "none at all is not the same"
