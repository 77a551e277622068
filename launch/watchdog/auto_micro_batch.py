"""`micro_batch_size=auto`: if memory runs out on any rank, all of them begin again with a smaller
micro-batch.

The rank that is out of memory cannot mend its step: the others wait for it in a collective, each with
gradients half made. So its verdict goes round as that on a failure does, the first one wins, and each process
replaces itself by a new one, which goes on from the newest checkpoint. More accumulation makes up for the
smaller size: the global batch stays, and with it the curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.runtime.files import write_text_atomically
from launch.watchdog.failure_report import NO_MEMORY, FailureReport, origin

if TYPE_CHECKING:
    from launch.cli.config import Config
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

KIND = "memory"
"""of a verdict that lets the ranks begin again"""
PHASES = ("data", "forward", "backward", "evaluate")
"""where the size of a micro-batch makes the difference"""


def sizes(config: Config, world: World) -> list[int]:
    """The micro-batches into which the global batch can be cut on these ranks, the largest first."""
    share = config.batch_size // world.world_size
    return [size for size in range(share, 0, -1) if share % size == 0]


def first_size(config: Config, world: World, run_dir: Path) -> int:
    """The micro-batch to begin with: the largest, or what a former life of the run has found to fit."""
    path, found = run_dir / "config.yaml", None
    if path.is_file():
        found = (yaml.safe_load(path.read_text()) or {}).get("micro_batch_size")
    limit = found if isinstance(found, int) else config.batch_size
    return next(size for size in sizes(config, world) if size <= limit)


def smaller(config: Config, world: World) -> int | None:
    """The largest micro-batch of at most half the size; None if there is none."""
    assert isinstance(config.micro_batch_size, int), "it has been found"
    return next((size for size in sizes(config, world) if size <= config.micro_batch_size // 2), None)


def ran_out(error: BaseException) -> bool:
    """Whether an allocation has failed, on the GPU or on the host."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


def verdict_on(error: BaseException, config: Config, world: World, phase: Phase) -> FailureReport | None:
    """The verdict that lets all ranks begin again; None if that would not help."""
    if (
        not ran_out(error)
        or phase.name not in PHASES
        or phase.step < 1
        or (size := smaller(config, world)) is None
    ):
        return None
    found = {"kind": KIND, **origin(world, phase), "micro_batch_size": size}
    return {
        **found,
        "message": f"rank {world.rank} on {found['host']} ran out of memory in step {phase.step}, {phase.name}, with "
        f"micro_batch_size={config.micro_batch_size}; all ranks begin again with {size}",
    }


def remember(verdict: FailureReport, run_dir: Path) -> None:
    """Keep the size for the lives to come: in config.yaml, from which other runs may be started too. Raises
    OSError.
    """
    path = run_dir / "config.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    content["micro_batch_size"] = verdict["micro_batch_size"]
    write_text_atomically(path, yaml.safe_dump(content, sort_keys=False))
