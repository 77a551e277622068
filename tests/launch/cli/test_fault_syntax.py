"""`chaos=`: which faults can be asked for, and that each can be injected."""

from __future__ import annotations

import pytest

from launch.cli.fault_syntax import FAULT_KINDS, Fault, parse_fault
from launch.watchdog.fault_injection import FAULTS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill", Fault("kill", 0, 5)),
        ("oom:rank=1", Fault("oom", 1, 5)),
        ("slow:step=9,rank=3", Fault("slow", 3, 9)),
    ],
)
def test_rank_and_step_have_defaults(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize("text", ["", "kil", "kill:rank", "kill:rank=x", "kill:rank=-1", "kill:at=3"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not KIND:rank=R,step=S, such as .*; kinds: kill, stall, slow"):
        parse_fault(text)


def test_each_kind_can_be_injected() -> None:
    assert tuple(FAULTS) == FAULT_KINDS
