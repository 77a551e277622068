"""rankzero: the real `launch.training.loop.train` with its record, checkpoints and watch, as
`launch.training.trainer` puts them together.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # its stubs forget them

from launch.cli.config import CheckpointOptions, Config, LogOptions
from launch.cli.resolve import Settings
from launch.reporting.console import Console
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import meet
from launch.runtime.world import World
from launch.state.build import prepare
from launch.training.loop import finish, train
from launch.watchdog.watchdog import Watchdog
from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.workloads import Workload
from tests.launch.runs import loop_parts

NEVER = 10**9
BARE: dict[str, Any] = {
    "checkpoint": CheckpointOptions(every=NEVER, every_minutes=None),
    "log": LogOptions(every=NEVER),
    "workers": 0,
}
"""what can be left out; each loss and norm is looked at all the same, and written at the end"""

stores: list[Store] = []
"""one a process: rank zero serves it"""


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """The last step saves, after the last stamp."""
    world = World(
        rank=setting.rank, local_rank=setting.rank, world_size=setting.ranks, local_world_size=setting.ranks
    )
    if not stores:
        stores.append(meet(world, 60.0) if setting.ranks > 1 else HashStore())
    world = World(**{**vars(world), "store": stores[0]})
    config = Config(
        recipe="workload",
        strategy=setting.strategy,  # type: ignore[arg-type]  # one of them
        batch_size=workload.batch,
        micro_batch_size=workload.batch // setting.ranks,
        steps=steps,
        clip_norm=CLIP_NORM,
        **(BARE if setting.bare else {}),
    )
    phase = Phase()
    watchdog = Watchdog(world, phase, config.hang_timeout)
    run = prepare(Settings(config, workload), world, phase)
    console = Console(setting.rank == 0 and not setting.bare, stream=sys.stdout)
    setting.folder.mkdir(parents=True, exist_ok=True)
    parts = loop_parts(run, setting.folder, console)
    train(run, *parts)
    finish(run, *parts)
    parts.metrics.close()
    watchdog.close()
