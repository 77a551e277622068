"""`micro_batch_size=auto`: if memory runs out on any rank, all ranks restart with a smaller micro-batch.

The rank that is out of memory cannot repeat its step: the others wait for it in a collective, each with
gradients half accumulated. So its report is published as that of a failure is, the first one wins, and each
process re-executes itself and resumes from the newest checkpoint. More gradient accumulation makes up for the
smaller size: the global batch stays, and with it the loss curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.runtime.files import write_text_atomically
from launch.watchdog.exception_report import OUT_OF_MEMORY, origin
from launch.watchdog.failure_report import FailureReport

if TYPE_CHECKING:
    from launch.cli.config import Config
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

PHASES = ("data", "forward", "backward", "evaluate")
"""in which the size of a micro-batch makes the difference"""


def sizes(config: Config, world: World) -> list[int]:
    """The micro-batch sizes that divide the batch of one rank, the largest first."""
    per_rank = config.batch_size // world.world_size
    return [size for size in range(per_rank, 0, -1) if per_rank % size == 0]


def first_size(config: Config, world: World, run_dir: Path) -> int:
    """The size to start with: the largest, or what an attempt before this one has found to fit."""
    path, remembered = run_dir / "config.yaml", None
    if path.is_file():
        remembered = (yaml.safe_load(path.read_text()) or {}).get("micro_batch_size")
    limit = remembered if isinstance(remembered, int) else config.batch_size
    return next(size for size in sizes(config, world) if size <= limit)


def smaller(config: Config, world: World) -> int | None:
    """The largest size of at most half of the present one; None if there is none."""
    present = config.micro_batch_size
    assert isinstance(present, int), "it has been resolved"
    return next((size for size in sizes(config, world) if size <= present // 2), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the GPU or on the host."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY)


def restart_report(error: BaseException, config: Config, world: World, phase: Phase) -> FailureReport | None:
    """The report that lets all ranks restart; None if that would not help."""
    if not is_out_of_memory(error) or phase.name not in PHASES or phase.step < 1:
        return None
    if (size := smaller(config, world)) is None:
        return None
    where = origin(world, phase)
    return FailureReport(
        kind="memory",
        **where,
        micro_batch_size=size,
        message=f"rank {world.rank} on {where['host']} ran out of memory in step {phase.step}, {phase.name}, "
        f"with micro_batch_size={config.micro_batch_size}; all ranks restart with {size}",
    )


def remember(report: FailureReport, run_dir: Path) -> None:
    """Keep the size for the attempts to come: in config.yaml, from which other runs may be started too.
    Raises OSError.
    """
    path = run_dir / "config.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    content["micro_batch_size"] = report.micro_batch_size
    write_text_atomically(path, yaml.safe_dump(content, sort_keys=False))
