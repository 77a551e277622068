"""The raw loop against rankzero at the highest rung of a ladder, both under one strategy on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from launch.cli.config import CheckpointOptions, Config
from launch.cli.resolve import Settings
from launch.reporting.console import Console
from launch.reporting.metrics import Metrics
from launch.reporting.throughput import peak_memory
from launch.runtime.phase import Phase
from launch.runtime.rendezvous import process_group
from launch.runtime.versions import versions
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import train
from launch.watchdog.watchdog import Watchdog
from tests.benchmarks.gpu_rows import LEFT_OUT, WRONG, Bench, Row
from tests.benchmarks.gpu_rows.ladders import NEVER, SAME, apart, fitting, speed, top, trained
from tests.benchmarks.gpu_rows.models import Rung
from tests.benchmarks.gpu_rows.timing import paced, release
from tests.benchmarks.loops import BOUND
from tests.benchmarks.loops.compare import silence
from tests.benchmarks.report import in_turns, ratios

DUELS = (("gpt", "single"), ("gpt", "ddp"), ("gpt", "fsdp"), ("gpt", "zero2"), ("resnet", "single"))
AIM = "<= 1.005"


def rows(bench: Bench) -> Iterator[Row]:
    """A row a pair."""
    for kind, strategy in DUELS:
        yield Row(
            section="loop", name=f"{kind}, {strategy}", measure=partial(fight, bench, kind, strategy), aim=AIM
        )


def fight(bench: Bench, kind: str, strategy: str) -> dict[str, Any]:
    """Step times of both, their ratio, and how far their losses are apart; no ratio if that is too far."""
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        return {"note": f"{LEFT_OUT}: deepspeed is not installed"}
    chatter = silence if strategy.startswith("zero") else nullcontext
    with (
        process_group(World(), strategy) as world,
        TemporaryDirectory() as folder,
        chatter(Path(folder) / "output"),
    ):
        pairs = fitting(top(bench, kind), partial(turns, bench.rounds, strategy, world, Path(folder)))
    theirs, mine = zip(*pairs, strict=True)
    losses = max(apart(a.first_losses, b.first_losses) for a, b in pairs)
    expected = "whole" if strategy in ("single", "ddp") else strategy
    if wrong := {rung.held for rung in (*theirs, *mine)} - {expected}:
        return {"note": f"{WRONG}: was asked for {strategy}, holds the model {', '.join(wrong)}"}
    if not losses <= SAME[kind]:
        return {"losses": losses, "note": f"{WRONG}: {losses:.0e} from the losses of the raw loop"}
    seconds = median(rung.paces[0] for rung in mine)
    return {
        **speed(bench, kind, mine[0], seconds),
        "raw_ms": median(rung.paces[0] for rung in theirs) * 1e3,
        **ratios([(a.paces[0], b.paces[0]) for a, b in pairs]),
        "losses": losses,
        "memory_gb": max(rung.peak for rung in mine) / 1e9,
        "raw_memory_gb": max(rung.peak for rung in theirs) / 1e9,
    }


def turns(rounds: int, strategy: str, world: World, folder: Path, rung: Rung) -> list[tuple[Rung, Rung]]:
    """Pairs (raw, rankzero); what the first has compiled serves all."""
    return in_turns(partial(trained, rung, strategy), partial(ours, rung, strategy, world, folder), rounds)


def ours(rung: Rung, strategy: str, world: World, folder: Path) -> Rung:
    """The rung, once `launch.training.loop.train` has trained it."""
    rung = replace(rung)
    release(rung.device)
    with run_of(rung, strategy, world, folder) as (run, metrics):
        metrics.checkpoint_writer.reserve = lambda: None  # type: ignore[method-assign]  # once in a run: no part of a step
        steps = run.train_steps
        run.train_steps = lambda: paced(steps(), rung.device, rung.seconds, rung.paces)  # type: ignore[method-assign]
        train(run, metrics)
        rung.peak = peak_memory(rung.device)
    return rung


@contextmanager
def run_of(
    rung: Rung, strategy: str, world: World, folder: Path, **checkpoint: Any
) -> Iterator[tuple[Run, Metrics]]:
    """A run as `launch.training.trainer` puts it together, with a line on its screen each ten steps, that
    saves only if it is told to.
    """
    config = Config(
        recipe="rung",
        strategy=strategy,  # type: ignore[arg-type]  # one of them
        batch_size=rung.batch,
        steps=NEVER,
        precision=rung.precision,  # type: ignore[arg-type]
        compile=rung.compiled,
        clip_norm=BOUND,
        checkpoint=CheckpointOptions(every=NEVER, every_minutes=None, **checkpoint),
    )
    torch.backends.cudnn.benchmark = False  # torch's default: a run of rankzero leaves it so
    phase, run_dir = Phase(), Path(mkdtemp(dir=folder))
    watchdog = Watchdog(world, phase, config.hang_timeout)
    try:
        with (run_dir / "screen").open("w") as console:
            run = prepare(Settings(config, rung), world, phase)
            metrics = Metrics(run, run_dir, versions(), Console(speaks=True, stream=console))
            yield run, metrics
            metrics.finish()
            metrics.close()
    finally:
        watchdog.close()
