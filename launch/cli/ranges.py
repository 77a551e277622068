"""The range of an annotated type such as `Annotated[int, Ge(1)]`, for people. pydantic is what checks it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
"""pydantic's types of error for a value of the right type and out of its range"""


def describe_range(annotated: Any) -> str:
    """What a value must be: `1 or more`, `from 0 to below 1`, `1 or more, or auto`."""
    ranges = [describe_bounds(bounds) for bounds in bounds_in(annotated)]
    return ", or ".join([*dict.fromkeys(ranges), *literals_in(annotated)])


def bounds_in(annotated: Any) -> Iterator[list[Any]]:
    """The bounds of each annotated type within a type: of a union's members, of a tuple's elements."""
    if get_origin(annotated) is Annotated:
        yield [bound for bound in annotated.__metadata__ if isinstance(bound, Ge | Gt | Le | Lt)]
    else:
        for part in get_args(annotated):
            yield from bounds_in(part)


def literals_in(annotated: Any) -> Iterator[str]:
    """The strings that a union takes beside its numbers."""
    if get_origin(annotated) in (Union, types.UnionType):
        for part in get_args(annotated):
            if get_origin(part) is Literal:
                yield from (str(value) for value in get_args(part))


def describe_bounds(bounds: list[Any]) -> str:
    """`1 or more`, `from 0 to below 1`, `greater than 0 and below 1`, ..."""
    low = high = ""
    for bound in bounds:
        match bound:
            case Ge(ge=value):
                low = f"from {value:g}"
            case Gt(gt=value):
                low = f"greater than {value:g}"
            case Le(le=value):
                high = f"at most {value:g}"
            case Lt(lt=value):
                high = f"below {value:g}"
    if low.startswith("from "):
        least = low.removeprefix("from ")
        return f"{low} to {high.removeprefix('at most ')}" if high else f"{least} or more"
    return " and ".join(part for part in (low, high) if part)
