"""How far the strategies lie from a single process, on the first steps of a recipe: `rankzero parity`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.resolve import Settings
from launch.equivalence.parity_cases import Comparison, ParityCase, plan_cases
from launch.equivalence.parity_result import compare_case
from launch.equivalence.parity_table import print_parity
from launch.equivalence.subprocesses import launch_command, subprocess_environment

if TYPE_CHECKING:
    from launch.equivalence.parity_result import Trajectory


def compare_strategies(settings: Settings, argv: list[str], comparison: Comparison) -> int:
    """Run all cases of `argv` (without `strategy=`), print how far they lie apart; returns the exit code."""
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
    program = launch_command("equivalence/trajectory.py", ranks)
    subprocess.run([*program, str(folder)], env=subprocess_environment(comparison.ranks), check=False)
    paths = {case.name: folder / f"{case.name}.safetensors" for case in cases}
    return {name: load_file(path) for name, path in paths.items() if path.exists()}
