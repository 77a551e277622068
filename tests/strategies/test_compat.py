"""Undocumented names of torch and DeepSpeed: where one is missing, set-up says so and names the versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest
import torch

from strategies import deepspeed_compat, torch_compat
from strategies.compat import UnsupportedVersionError
from tests.ranks import CpuWorld, run_ranks
from tests.strategies.training import Case, set_up


@contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """`owner`, a module or class, as in a version of the library that has no `name`."""
    value = getattr(owner, name)
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def message(world: CpuWorld, strategy: str, owner: Any, name: str) -> str:
    """What setting up a model says without a name of the library."""
    case = Case(options=(("activation_checkpointing", "selective"),))
    with without(owner, name):
        try:
            set_up(world, strategy, case)
        except UnsupportedVersionError as error:
            return str(error)
    return ""


def without_foreach(world: CpuWorld) -> str:
    return message(world, "single", torch, "_foreach_norm")


def without_gradients_of_zero(world: CpuWorld) -> str:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return message(world, "zero1", DeepSpeedZeroOptimizer, "update_lp_params")


def without_partitions_of_zero3(world: CpuWorld) -> str:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return message(world, "zero3", DeepSpeedZeroOptimizer_Stage3, "_partition_all_parameters")


def without_linear_of_zero3(world: CpuWorld) -> str:
    import deepspeed.runtime.zero.linear as linear

    return message(world, "zero3", linear, "zero3_linear_wrap")


def without_record_of_fsdp(world: CpuWorld) -> str:
    strategy: Any = set_up(world, "fsdp", Case())
    state = strategy._units[-1]._get_fsdp_state()
    return message(world, "fsdp", type(state._comm_ctx), "lazy_init")


def test_a_missing_name_of_torch_is_an_error_that_names_the_versions() -> None:
    (text,) = run_ranks(1, without_foreach)
    assert text == (
        f"torch {version('torch')} has no torch._foreach_norm, which this strategy relies on; "
        f"tested with {torch_compat.TESTED}: pip install torch=={torch_compat.TESTED}"
    )
    assert "has no FSDPCommContext.lazy_init" in run_ranks(2, without_record_of_fsdp)[0]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (without_gradients_of_zero, "DeepSpeedZeroOptimizer.update_lp_params"),
        (without_partitions_of_zero3, "DeepSpeedZeroOptimizer_Stage3._partition_all_parameters"),
        (without_linear_of_zero3, "deepspeed.runtime.zero.linear.zero3_linear_wrap"),
    ],
)
def test_a_missing_name_of_deepspeed_is_an_error_that_names_the_versions(function: Any, name: str) -> None:
    for text in run_ranks(2, function):
        assert f" has no {name}, which this strategy relies on; " in text
        assert text.startswith("DeepSpeed 0.")
        assert text.endswith(f"pip install deepspeed=={deepspeed_compat.TESTED}")


def test_an_operator_that_selective_checkpointing_relies_on_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_compat, "EXPENSIVE_OPERATORS", ("mm", "renamed_attention"))
    with pytest.raises(UnsupportedVersionError, match=r"has no torch\.ops\.aten\.renamed_attention"):
        torch_compat.expensive_operators()
