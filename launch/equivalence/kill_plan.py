"""Which runs are killed, how, and which other runs resume from what they leave. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from launch.equivalence.subprocesses import RankLayout


@dataclass(frozen=True)
class Extent:
    """How much is checked."""

    ranks: list[int]
    """the first is that of the runs that are killed; the others, and 1, only read"""
    strategies: list[str]
    steps: int
    all: bool

    @property
    def every(self) -> int:
        """Steps between checkpoints: a quarter of the run."""
        return max(self.steps // 4, 1)

    @property
    def half(self) -> int:
        """The step of the checkpoint after which a run is killed."""
        return self.steps // 2 // self.every * self.every


@dataclass(frozen=True)
class KillPlan:
    """A layout whose run is killed."""

    layout: RankLayout
    kills_in_save: list[bool]
    """for each kill, whether it is in the middle of a save"""
    readers: list[RankLayout]
    """other layouts, which resume from the checkpoint that the first killed run leaves"""

    @property
    def num_runs(self) -> int:
        """How many runs are started: one without interruption, then two for each kill, and the readers."""
        return 1 + 2 * len(self.kills_in_save) + len(self.readers)


def plan_kills(extent: Extent) -> list[KillPlan]:
    """One plan for each strategy.

    Without `extent.all`, kills beside and in the middle of a save take turns, and the checkpoint of each
    strategy is read by the next strategy, on another number of ranks if it can.
    """
    layouts = [
        RankLayout(name, ranks)
        for name in extent.strategies
        for ranks in ([1] if name == "single" else [1, *sorted(set(extent.ranks))])
    ]
    plans = []
    for index, name in enumerate(extent.strategies):
        writer = RankLayout(name, 1 if name == "single" else extent.ranks[0])
        readers = [reader for reader in layouts if reader != writer]
        if not extent.all:
            following = extent.strategies[(index + 1) % len(extent.strategies)]
            readers = [reader for reader in readers if reader.strategy == following]
            readers = [reader for reader in readers if reader.ranks != writer.ranks] or readers
        both = extent.all or len(extent.strategies) == 1
        plans.append(KillPlan(writer, [False, True] if both else [index % 2 == 1], readers))
    return plans
