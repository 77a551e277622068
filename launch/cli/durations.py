"""The syntax of `max_time=`: a time limit as SLURM writes it. No torch."""

from __future__ import annotations


def parse_duration(text: str) -> float:
    """Seconds of a time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises ValueError."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise ValueError(
            f"max_time={text} is no time; write it as SLURM does: 90 (minutes), 1:30:00, 2-12 (days-hours)"
        )
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, numbers[0], 0
    else:
        hours, minutes, seconds = [0, *numbers][-3:]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
