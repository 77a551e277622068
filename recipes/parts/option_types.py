"""What groups of options share: ranges as annotated types, and the check of what has no effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Self

from annotated_types import Ge, Gt, Le, Lt

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
"""a part of a whole, and not all of it"""
ZeroToOne = Annotated[float, Ge(0), Le(1)]


@dataclass(kw_only=True)
class OptionGroup:
    """A group of a recipe's options, such as `optim.*`, that checks itself.

    Types and ranges are checked where values are read from the command line; `check` is for the rest.
    """

    def check(self, declared: Self | None = None) -> None:
        """Raise ValueError or FileNotFoundError for options that cannot work together. Imports no torch.

        `declared` is what the recipe has for them, which is not held against the user.
        """


def check_groups(options: Any) -> None:
    """Check each group among the fields of a recipe. Raises ValueError or FileNotFoundError."""
    for item in fields(options):
        group = getattr(options, item.name)
        if isinstance(group, OptionGroup):
            declared = item.default if item.default_factory is MISSING else item.default_factory()
            group.check(declared if isinstance(declared, OptionGroup) else None)


def refuse_unused(prefix: str, options: Any, declared: Any, used_by: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError for a field that was given although it has no effect under `options.name`.

    "Given" means: differs from what the recipe declares, so that a recipe's own AdamW betas don't forbid
    optim.name=sgd.
    """
    for field, names in used_by.items():
        value = getattr(options, field)
        if options.name not in names and value != getattr(declared, field):
            raise ValueError(
                f"{prefix}.{field}={value} has no effect under {prefix}.name={options.name}: "
                f"leave it out, or take {prefix}.name={'|'.join(names)}"
            )
