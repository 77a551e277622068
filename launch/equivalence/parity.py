"""Prove on your own recipe that the strategies agree.

    python launch/commands/parity.py recipe=gpt
    python launch/commands/parity.py recipe=./mine.py precision=bf16 ranks=4 strategies=ddp,fsdp compare=20

Makes the first steps of the run (compare=5) as a single process, then under each strategy on ranks=2
processes that it starts itself, with accumulation 1 and 4, with clipping and with activation checkpointing,
on the same global batches; prints how far losses, gradient norms and final weights lie apart. Works without a
GPU. All keys of a run work here too. Exit codes: 0 they agree; 1 a row failed; 2 a mistake in the command.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import help
from launch.cli.config import exit_with_mistake, read_line
from launch.cli.resolve import Settings, resolve
from launch.equivalence.common import choose_strategies, command, environment, whole_number, without
from launch.equivalence.parity_cases import Comparison, ParityCase, plan_cases
from launch.equivalence.parity_result import compare_case
from launch.equivalence.parity_table import print_parity
from launch.runtime.world import World
from strategies import STRATEGIES

if TYPE_CHECKING:
    from launch.equivalence.parity_result import Trajectory

OWN_KEYS = ("ranks", "strategies", "compare")


def main(words: list[str]) -> int:
    """Compare; returns the exit code."""
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return 0
        own, words = own_keys(words)
        settings = resolve([*words, "strategy=single"], World())
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, 0)
    return compare_strategies(settings, words, own)


def own_keys(words: list[str]) -> tuple[Comparison, list[str]]:
    """This command's own keys, and the other words. Raises ValueError for what they cannot be."""
    line = read_line(words)
    ranks = whole_number("ranks", line.get("ranks", "2"), "processes", 2)
    steps = whole_number("compare", line.get("compare", "5"), "steps", 1)
    everywhere = [name for name in STRATEGIES if name != "single"]
    chosen = choose_strategies(line, everywhere, everywhere)
    return Comparison(ranks=ranks, steps=steps, strategies=chosen), without(words, (*OWN_KEYS, "strategy"))


def compare_strategies(settings: Settings, argv: list[str], comparison: Comparison) -> int:
    """Run all cases of `argv`, without `strategy=`, and print how far they lie apart. Returns the exit code."""
    cases = plan_cases(settings, argv, comparison)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        trajectories = run_cases(cases, comparison, Path(folder))
    precision = settings.config.precision
    results = [compare_case(case, trajectories, precision) for case in cases if case.strategy != "single"]
    print_parity(results, trajectories.values(), settings.config, comparison)
    return int(any(result.problem for result in results))


def run_cases(cases: Sequence[ParityCase], comparison: Comparison, folder: Path) -> dict[str, Trajectory]:
    """The trajectories by the name of their case; without those of cases whose processes failed."""
    single = [case for case in cases if case.strategy == "single"]
    spread = [case for case in cases if case.strategy != "single"]
    print(f"running {len(single)} cases as a single process ...", flush=True)
    trajectories = run_together(single, 1, comparison, folder)
    print(f"running {len(spread)} cases on {comparison.ranks} ranks ...", flush=True)
    return trajectories | run_together(spread, comparison.ranks, comparison, folder)


def run_together(
    cases: Sequence[ParityCase], ranks: int, comparison: Comparison, folder: Path
) -> dict[str, Trajectory]:
    """The trajectories of cases that one set of processes runs one after the other."""
    from safetensors.torch import load_file

    content = {"steps": comparison.steps, "cases": {case.name: case.argv for case in cases}}
    (folder / "cases.json").write_text(json.dumps(content))
    program = command("equivalence/trajectory.py", ranks)
    subprocess.run([*program, str(folder)], env=environment(comparison.ranks), check=False)
    paths = {case.name: folder / f"{case.name}.safetensors" for case in cases}
    return {name: load_file(path) for name, path in paths.items() if path.exists()}
