"""What rank zero prints: where the time of a step goes, in which operations, and which keys may help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from launch.cli.rich_table import make_table
from launch.profiling.events import OperationTime
from launch.profiling.key_suggestions import mean_times, suggest
from launch.profiling.measure import RankStepTimes
from launch.reporting.console import describe_loading, device_name, enabled_options
from launch.reporting.throughput import duration

if TYPE_CHECKING:
    from rich.table import Table

    from launch.state.run import Run

MAX_SUGGESTIONS = 2
MAX_OPERATIONS = 10
NAME_WIDTH = 44
"""columns for the name of an operation: a row fits 80"""


def print_profile(
    run: Run, ranks: Sequence[RankStepTimes], operations: Sequence[OperationTime], steps: int
) -> None:
    """Print the setup, both tables and the suggestions; `ranks` are the times of each rank, in order."""
    from rich.console import Console

    gpu, console = run.world.device != "cpu", Console(highlight=False)
    for name, text in describe_profile(run, ranks, steps).items():
        console.print(f"{name:<10}{text}")
    console.print(step_table(ranks, gpu))
    for note in explanations(ranks, gpu):
        console.print(note)
    console.print(operations_table(operations, mean_times(ranks).step, steps, gpu))
    for suggestion in islice(suggest(run, ranks), MAX_SUGGESTIONS):
        console.print(f"suggestion: {suggestion}")


def describe_profile(run: Run, ranks: Sequence[RankStepTimes], steps: int) -> dict[str, str]:
    """What was measured, and how long a step takes."""
    plan, config, mean = run.batch_plan, run.config, mean_times(ranks)
    fullest = " on the fullest rank" if len(ranks) > 1 else ""
    memory = f"{max(times.peak_memory for times in ranks) / 1e9:,.2f} GB{fullest}"
    return {
        "recipe": f"{config.recipe}, {describe_loading(run)}",
        "strategy": ", ".join([config.strategy, config.precision, *enabled_options(run)]),
        "device": device_name(run.world.device),
        "batch": (
            f"{plan.batch_size} = {plan.micro_batch_size} micro x {plan.accumulation_steps} accumulation x "
            f"{plan.world_size} rank(s)"
        ),
        "step": (
            f"{duration(mean.unprofiled_step / 1e3)}, with the profiler {duration(mean.step / 1e3)} "
            f"(means of {steps})"
        ),
        "memory": f"peak {memory}",
    }


def step_table(ranks: Sequence[RankStepTimes], gpu: bool) -> Table:
    """Where a step goes: the mean over the ranks and, if there are several, the ranks with the least and the
    most.
    """
    device = {
        "computing": [times.compute for times in ranks],
        "exposed communication": [times.exposed_communication for times in ranks],
        "exposed copies, host and device": [times.exposed_copies for times in ranks],
        "idle" if gpu else "outside of operations": [times.idle for times in ranks],
    }
    totals = {
        "all communication": [times.communication for times in ranks],
        "all copies": [times.copies for times in ranks],
    }
    prefix = "host: " if gpu else ""
    host = {
        f"{prefix}data": [times.data for times in ranks],
        f"{prefix}forward": [times.forward for times in ranks],
        f"{prefix}backward": [times.backward for times in ranks],
        f"{prefix}optimizer step": [times.optimizer_step for times in ranks],
    }
    several = len(ranks) > 1
    first = f"mean of {len(ranks)} ranks" if several else "step"
    table = make_table((first, ">ms", ">share", *((">least (rank)", ">most (rank)") if several else ())))
    step = mean_times(ranks).step
    for group in (device, totals, host):
        for name, values in group.items():
            if name in ("idle", "computing") or any(values):
                mean = sum(values) / len(values)
                extremes = [f"{value:.2f} ({values.index(value)})" for value in (min(values), max(values))]
                table.add_row(name, f"{mean:.2f}", f"{mean / step:.1%}", *(extremes if several else ()))
        table.add_section()
    return table


def explanations(ranks: Sequence[RankStepTimes], gpu: bool) -> Iterator[str]:
    """What one has to know to read the table of a step."""
    if not any(times.communication for times in ranks):
        return
    yield f"Exposed: no {'kernel' if gpu else 'operation'} computes on this rank at the same time."
    if len(ranks) > 1:
        least = min(times.exposed_communication for times in ranks)
        yield (
            "A rank that comes early waits in the communication for the last one. The transfer itself "
            f"takes at most the least of all ranks, {least:.2f} ms; what another rank has beyond that is "
            "waiting."
        )


def operations_table(operations: Sequence[OperationTime], step_ms: float, steps: int, gpu: bool) -> Table:
    """The most expensive operations of rank zero."""
    heading = f"most expensive {'kernels, by operation' if gpu else 'operations'} of rank 0"
    table = make_table((heading, ">calls", ">ms", ">share"))
    for operation in operations[:MAX_OPERATIONS]:
        calls, ms = operation.calls / steps, operation.microseconds / steps / 1e3
        table.add_row(shorten(operation.name), f"{calls:,.0f}", f"{ms:.2f}", f"{ms / step_ms:.1%}")
    rest_ms = sum(operation.microseconds for operation in operations[MAX_OPERATIONS:]) / steps / 1e3
    if rest_ms:
        others = f"{len(operations) - MAX_OPERATIONS} others"
        table.add_row(others, "", f"{rest_ms:.2f}", f"{rest_ms / step_ms:.1%}")
    return table


def shorten(name: str) -> str:
    """The name of an operation or kernel, without what only a compiler reads."""
    name = name.removeprefix("void ").strip("# ")
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
