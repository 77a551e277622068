"""What the watchdog costs: the roll-call at the start, then heartbeats and watchdog beside steps of 20
ms.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=4 tests/benchmarks/watchdog.py seconds=20

The roll-call is timed from the moment when all ranks are there to the last rank leaving, the first time with
all its look-ups. Of the watch it is the processor time of its two threads on the busiest rank, which looks at
all others, as the kernel counts it.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # its stubs forget it

from launch.cli.command import read_command
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import check_ranks, process_group, rank_info
from launch.runtime.world import World, find_world
from launch.watchdog.watchdog import Watchdog

STEP = 0.02
"""seconds"""


def check_seconds(world: World, number: int) -> float:
    """Of one roll-call over all ranks, on the slowest."""
    fresh = replace(world, store=PrefixStore(f"try-{number}", world.store))
    dist.barrier()
    since = time.perf_counter()
    check_ranks(fresh, rank_info(fresh, "the same text on all ranks"), 60)
    return slowest(time.perf_counter() - since)


def watch_share(world: World, seconds: float) -> tuple[float, float]:
    """Processor time of the watch's threads, as a share of the time that passed, on the busiest rank; and
    that in steps.
    """
    phase = Phase()
    watchdog = Watchdog(world, phase, hang_timeout=60)
    time.sleep(3)  # it has connected
    weight = torch.randn(512, 512)
    before, since = used(watchdog), time.perf_counter()
    while (passed := time.perf_counter() - since) < seconds:
        until = time.perf_counter() + STEP
        phase.step += 1
        phase.enter("forward")
        while time.perf_counter() < until:
            weight @ weight
    share = slowest((used(watchdog) - before) / passed)
    watchdog.close()
    return share, share * STEP


def used(watchdog: Watchdog) -> float:
    """Seconds of processor time that its threads have had."""
    tasks = Path("/proc/self/task")
    numbers = [thread.native_id for thread in watchdog.threads]
    return sum(int((tasks / str(number) / "schedstat").read_text().split()[0]) for number in numbers) / 1e9


def slowest(seconds: float) -> float:
    """The largest of all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    seconds: float = 20.0
    """how long steps are made beside the watchdog"""
    rounds: int = 10
    """roll-calls"""


def main(argv: list[str]) -> None:
    """Print the table, on rank zero."""
    options = read_command(argv, __doc__, Options, name="watchdog.py", on_ranks=True).options
    with process_group(find_world(os.environ)) as world:
        times = [check_seconds(world, number) for number in range(options.rounds)]
        share, each = watch_share(world, options.seconds)
        if world.rank == 0:
            print(
                f"torch {torch.__version__}, {world.world_size} ranks, {os.cpu_count()} cores, "
                f"load {os.getloadavg()[0]:.1f}"
            )
            print(f"roll-call, the first     {times[0] * 1e3:8.1f} ms")
            print(f"roll-call, median after  {median(times[1:]) * 1e3:8.1f} ms")
            print(
                f"watch                    {each * 1e6:8.1f} us of a step of {STEP * 1e3:.0f} ms: {share:.3%}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
