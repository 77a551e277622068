"""The table of `rankzero parity`. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from launch.cli.config import Config
from launch.cli.rich_table import make_table
from launch.equivalence.parity_cases import Comparison
from launch.equivalence.parity_result import ParityResult, elements_without_gradient
from launch.equivalence.tolerances import TOLERANCES

if TYPE_CHECKING:
    from torch import Tensor

    from launch.equivalence.parity_result import Trajectory


def print_parity(
    results: Sequence[ParityResult],
    trajectories: Iterable[Trajectory],
    config: Config,
    comparison: Comparison,
) -> None:
    """Print the rows, what is wrong with each, what was left out, and the precision contract."""
    from rich.console import Console

    from strategies.precision import contract

    allowed = TOLERANCES[config.precision]
    columns = {
        "loss": allowed.loss,
        "grad norm": allowed.grad_norm,
        "weights": allowed.weights,
        "vs ddp": allowed.between_strategies,
    }
    headings = [f">{name}\n< {tolerance:g}" for name, tolerance in columns.items()]
    title = (
        f"recipe={config.recipe}: largest relative deviation of {comparison.ranks} ranks from a single "
        f"process, {comparison.steps} steps"
    )
    table = make_table(("strategy", "accum.", "with", *headings, ""), title=title, wrap=())
    for result in results:
        numbers = (result.loss, result.grad_norm, result.weights, result.between_strategies)
        table.add_row(
            result.case.strategy,
            str(result.case.accumulation_steps),
            result.case.variant,
            *(f"{number:.1e}" for number in numbers),
            "[red]FAIL" if result.problem else "[green]pass",
        )
    console = Console(highlight=False)
    console.print(table)
    for result in results:
        if result.problem:
            case = result.case
            setup = f"{case.strategy}, accumulation {case.accumulation_steps} {case.variant}".rstrip()
            console.print(f"{setup}: {result.problem}", style="red")
    for name in left_out(trajectories):
        console.print(f"left out, its true gradient being zero: {name}")
    console.print(f"{config.precision}: {contract(config.precision)}")


def left_out(trajectories: Iterable[Trajectory]) -> list[str]:
    """The parameters that were not compared, or not as a whole."""
    masks = [item for each in trajectories for item in elements_without_gradient(each).items()]
    return sorted({f"{name}{describe_part(mask)}" for name, mask in masks})


def describe_part(mask: Tensor) -> str:
    """How much of a parameter is left out, if not all of it."""
    return "" if mask.all() else f" ({int(mask.sum())} of {mask.numel()} elements)"
