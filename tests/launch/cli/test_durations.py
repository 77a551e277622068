"""`max_time=` is written as SLURM writes time limits."""

from __future__ import annotations

import pytest

from launch.cli.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-00", 86400),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("2-1:02:03", 176523),
    ],
)
def test_max_time_is_written_as_slurm_does(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1h", "-5", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"max_time={text} is no time; write it as SLURM does"):
        parse_duration(text)
