"""What the commands that prove something share: their own keys, how they start the real thing, how far apart
is too far.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from strategies import OPTIONS_GROUPS, STRATEGIES, missing_package

PLACES = {
    *(
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
"""variables by which a launcher places a process: one around the command must not place its runs"""


def choose_strategies(given: Sequence[str], allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """The strategies `given` or by default, without those whose library is not installed. Raises ValueError for
    any not `allowed`.
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


def without(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """The arguments that give none of the keys `names`."""
    return [argument for argument in argv if argument.partition("=")[0].removeprefix("--") not in names]


def for_strategy(words: Sequence[str], strategy: str) -> list[str]:
    """The words without the options of other strategies, which would be refused."""
    groups = set(OPTIONS_GROUPS) - {STRATEGIES[strategy].options_group}
    return [word for word in words if word.removeprefix("--").split(".")[0] not in groups]


def environment(ranks: int) -> dict[str, str]:
    """The environment of a process that a proof starts, on at most `ranks` ranks."""
    import torch

    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in PLACES and not name.startswith("TORCHELASTIC_")
    }
    # the same number of threads everywhere: sums are cut differently otherwise
    found = {**clean, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if torch.cuda.device_count() < ranks:
        found["CUDA_VISIBLE_DEVICES"] = ""  # fewer GPUs than ranks: all on the CPU
    return found


def command(program: str, ranks: int) -> list[str]:
    """How a user starts a file of `launch/`: under python, or on several ranks under torchrun."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    return [sys.executable, *torchrun, str(Path(__file__).parents[1] / program)]
