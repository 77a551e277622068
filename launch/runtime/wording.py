"""How messages write shapes, lists of names and counts. Imports nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def shape_text(shape: Iterable[int]) -> str:
    """A tensor's shape: `64 x 3 x 32 x 32`, or `scalar`."""
    return " x ".join(str(size) for size in shape) or "scalar"


def join_names(names: Sequence[str], limit: int = 10, noun: str = "") -> str:
    """`a, b, c and 7 more NOUN`: the first `limit` names and how many are left out, all of them if that is
    one.
    """
    if len(names) <= limit + 1:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more {noun}".rstrip()


def plural(count: int, noun: str) -> str:
    """`1 file`, `1,024 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
