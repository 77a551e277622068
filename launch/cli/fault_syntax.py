"""The syntax of `chaos=KIND:rank=R,step=S`, which `launch.watchdog.fault_injection` injects. No torch."""

from __future__ import annotations

from dataclasses import dataclass

FAULT_KINDS = ("kill", "stall", "slow", "nan", "sigterm", "torn_checkpoint", "oom")
DEFAULT_RANK, DEFAULT_STEP = "0", "5"


@dataclass(frozen=True)
class Fault:
    """What to inject, on which rank and in which optimizer step."""

    kind: str
    rank: int
    step: int


def parse_fault(text: str) -> Fault:
    """The fault that the value of `chaos=` describes. Raises ValueError."""
    kind, _, options = text.partition(":")
    given = dict(option.partition("=")[::2] for option in options.split(",")) if options else {}
    values = {"rank": DEFAULT_RANK, "step": DEFAULT_STEP} | given
    known = kind in FAULT_KINDS and set(values) == {"rank", "step"}
    if not known or not all(value.isdecimal() for value in values.values()):
        raise ValueError(
            f"chaos={text} is not KIND:rank=R,step=S, such as kill:rank=1,step=50; "
            f"kinds: {', '.join(FAULT_KINDS)}"
        )
    return Fault(kind, int(values["rank"]), int(values["step"]))
