"""What option dataclasses share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


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
