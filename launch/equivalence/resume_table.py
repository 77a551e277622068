"""The table of `rankzero resume_check`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from launch.cli.rich_table import make_table
from launch.equivalence.resume_result import ResumeResult
from launch.equivalence.tolerances import TOLERANCES

COLUMNS = (
    "saved by",
    "resumed by",
    "killed\nat step",
    ">from\nstep",
    ">steps\ncompared",
    ">largest\ndeviation",
    "final\nweights",
    "",
)
WEIGHTS = {None: "", True: "same", False: "differ"}


def print_results(results: Sequence[ResumeResult], precision: str, seconds: float) -> None:
    """Print the rows, what is wrong with each, and what was required."""
    from rich.console import Console

    table = make_table(COLUMNS, wrap=())
    for result in results:
        table.add_row(*cells(result))
    console = Console(highlight=False)
    console.print(table)
    for result in results:
        for message in filter(None, [*result.problems, result.note]):
            text = f"{result.writer} -> {result.reader}: {message}"
            console.print(text, style="red" if result.problems else "", soft_wrap=True)
    console.print("largest deviation: of losses and gradient norms, relative; 0 is bit-equal", soft_wrap=True)
    console.print(
        "required: 0, and the same bytes of final weights, where the same strategy resumes on as many "
        f"ranks; else at most {TOLERANCES[precision].loss:g}"
    )
    passed = sum(not result.problems for result in results)
    console.print(f"{passed} of {len(results)} passed in {seconds:.0f} s")


def cells(result: ResumeResult) -> list[str]:
    """The cells of a row."""
    killed = f"{result.killed_at}{', saving' * result.killed_in_save}" if result.killed_at else ""
    deviation = f"{result.max_deviation:.1e}" if result.max_deviation else "0"
    return [
        str(result.writer),
        str(result.reader),
        killed,
        str(result.resumed_from or ""),
        *([str(result.compared_steps), deviation] if result.compared_steps else ["", ""]),
        WEIGHTS[result.same_weights],
        "[red]FAIL" if result.problems else "[green]pass",
    ]
