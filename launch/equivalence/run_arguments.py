"""The arguments of the runs that a comparison starts: which strategies, and which keys they take. Imports no
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from strategies import OPTIONS_GROUPS, STRATEGIES, missing_package


def choose_strategies(given: Sequence[str], allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """The strategies `given` or by default, without those whose library is not installed. Raises ValueError
    for any not `allowed`.
    """
    chosen = list(dict.fromkeys(given or default))
    for name in chosen:
        if name not in allowed:
            raise ValueError(f"strategies={','.join(given)}: {name!r} is none of {', '.join(allowed)}")
    missing = {name: package for name in chosen if (package := missing_package(name))}
    if missing:
        chosen = [name for name in chosen if name not in missing]
        packages = " and ".join(sorted(set(missing.values())))
        if not chosen:
            raise ValueError(
                f"strategies={','.join(given)} needs {packages}, which is not installed: "
                f"pip install {packages}"
            )
        print(f"left out: {', '.join(missing)}; {packages} is not installed", file=sys.stderr)
    return chosen


def drop_keys(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """The arguments that give none of the keys `names`."""
    return [argument for argument in argv if argument.partition("=")[0].removeprefix("--") not in names]


def args_for_strategy(argv: Sequence[str], strategy: str) -> list[str]:
    """The arguments without the options of other strategies, which would be refused."""
    groups = set(OPTIONS_GROUPS) - {STRATEGIES[strategy].options_group}
    return [argument for argument in argv if argument.removeprefix("--").split(".")[0] not in groups]
