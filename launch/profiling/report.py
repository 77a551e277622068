"""What rank zero prints: where the time of a step went, in which operations, and what may help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from launch.profiling.measure import Figures
from launch.reporting.console import describe_loading, device_name, enabled_options
from launch.reporting.throughput import SLOW_DATA, data_advice, duration
from strategies import STRATEGIES

if TYPE_CHECKING:
    from rich.table import Table

    from launch.data.batch_plan import BatchPlan
    from launch.state.run import Run

EXPOSED, IDLE, COPIES, SLOWED = 0.10, 0.20, 0.05, 0.25
"""shares of a step from which something is worth a word; the last: what the profiler itself may add to it"""
MOST_ADVICE = 2
OPERATIONS = 10
NAME = 44
"""letters of the name of an operation"""


def mean_of(rows: Sequence[Figures]) -> Figures:
    """The mean over the ranks."""
    return Figures(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def show(run: Run, rows: Sequence[Figures], operations: Sequence[tuple[str, int, float]], steps: int) -> None:
    """All of it, but for the trace."""
    from rich.console import Console

    mean, gpu = mean_of(rows), run.world.device != "cpu"
    say = Console(highlight=False)
    memory = f"peak memory {max(row.memory for row in rows) / 1e9:,.2f} GB{' on the fullest rank' * (len(rows) > 1)}"
    for name, text in head(run).items():
        say.print(f"{name:<10}{text}")
    say.print(
        f"{'a step':<10}{duration(mean.plain / 1e3)}, under the profiler {duration(mean.step / 1e3)} (means of {steps}); {memory}"
    )
    say.print(where(rows, gpu))
    for note in notes(rows, gpu):
        say.print(note)
    say.print(top_operations(operations, mean.step, steps, gpu))
    for advice in islice(advise(run, rows), MOST_ADVICE):
        say.print(f"advice: {advice}")


def head(run: Run) -> dict[str, str]:
    """What was measured."""
    batch_plan, config = run.batch_plan, run.config
    return {
        "recipe": f"{config.recipe}, {describe_loading(run)}",
        "strategy": ", ".join([config.strategy, config.precision, *enabled_options(run)]),
        "device": device_name(run.world.device),
        "batch": f"{batch_plan.batch_size} = {batch_plan.micro_batch_size} micro x {batch_plan.accumulation_steps} accumulation x {batch_plan.world_size} rank(s)",
    }


# tables -----------------------------------------------------------------------------------------------------


def table_of(first: str, numbers: Sequence[str]) -> Table:
    """An empty table, as the other commands print them."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def where(rows: Sequence[Figures], gpu: bool) -> Table:
    """Where a step goes: the mean over the ranks and, if there are several, the ranks with the least and the
    most.
    """
    parts = {
        "computing": [row.computing for row in rows],
        "exposed communication": [row.exposed for row in rows],
        "exposed copies, host and device": [row.exposed_copies for row in rows],
        "idle" if gpu else "outside of operations": [row.idle for row in rows],
    }
    within = {
        "all communication": [row.communication for row in rows],
        "all copies": [row.copies for row in rows],
    }
    host = {
        f"{'host: ' if gpu else ''}{words}": [getattr(row, name) for row in rows]
        for name, words in (
            ("data", "data"),
            ("forward", "forward"),
            ("backward", "backward"),
            ("update", "optimizer step"),
        )
    }
    whole = sum(row.step for row in rows) / len(rows)
    several = len(rows) > 1
    ends = ("least (rank)", "most (rank)") if several else ()
    table = table_of(f"mean of {len(rows)} ranks" if several else "", ("ms a step", "share", *ends))
    for group in (parts, within, host):
        for name, values in group.items():
            if name in ("idle", "computing") or any(values):
                mean = sum(values) / len(values)
                edges = [f"{value:.2f} ({values.index(value)})" for value in (min(values), max(values))]
                table.add_row(name, f"{mean:.2f}", f"{mean / whole:.1%}", *(edges if several else ()))
        table.add_section()
    return table


def notes(rows: Sequence[Figures], gpu: bool) -> Iterator[str]:
    """What one has to know to read the table."""
    if not any(row.communication for row in rows):
        return
    yield f"Exposed: no {'kernel' if gpu else 'operation'} computes on this rank at the same time."
    if len(rows) > 1:
        yield (
            "A rank that comes early waits in the communication for the last one. The transfer itself takes at most the least of "
            f"all ranks, {min(row.exposed for row in rows):.2f} ms; what another one has beyond that is waiting."
        )


def top_operations(operations: Sequence[tuple[str, int, float]], step: float, steps: int, gpu: bool) -> Table:
    """The operations of rank zero that take most."""
    table = table_of(
        f"rank 0: {'kernels by operation' if gpu else 'operations'}", ("calls a step", "ms a step", "share")
    )
    for name, calls, time in operations[:OPERATIONS]:
        each = time / steps / 1e3
        table.add_row(shortened(name), f"{calls / steps:,.0f}", f"{each:.2f}", f"{each / step:.1%}")
    rest = sum(time for _, _, time in operations[OPERATIONS:]) / steps / 1e3
    if rest:
        table.add_row(f"{len(operations) - OPERATIONS} others", "", f"{rest:.2f}", f"{rest / step:.1%}")
    return table


def shortened(name: str) -> str:
    """The name of an operation or kernel, without what only a compiler reads."""
    name = name.removeprefix("void ").strip("# ")
    return name if len(name) <= NAME else name[: NAME - 3] + "..."


# advice -----------------------------------------------------------------------------------------------------


def advise(run: Run, rows: Sequence[Figures]) -> Iterator[str]:
    """What may help, the most likely first. Only keys that exist, and that are not already set."""
    mean, gpu = mean_of(rows), run.world.device != "cpu"
    if gpu and not mean.computing:
        yield "the profiler saw no kernel on the GPU: KINETO_LOG_LEVEL=0 says why (no access to CUPTI, or another profiler?)"
        return
    found = [*about_waiting(run, rows), *about_device(run, mean)]
    if mean.step > (1 + SLOWED) * mean.plain:
        found.append(
            f"the profiler has made a step {mean.step / mean.plain - 1:.0%} longer: there are many small operations, and their "
            "share is less than it says"
        )
    faster = "; precision=bf16 or tf32 computes faster" if gpu and run.config.precision == "fp32" else ""
    yield from found or [
        f"nothing stands out: {mean.computing / mean.step:.0%} of a step is computing{faster}"
    ]


def about_waiting(run: Run, rows: Sequence[Figures]) -> Iterator[str]:
    """For data, for other ranks, for the network."""
    mean, gpu = mean_of(rows), run.world.device != "cpu"
    if mean.data > SLOW_DATA * mean.step and (not gpu or mean.idle > SLOW_DATA * mean.step):
        yield f"{mean.data / mean.step:.0%} of a step is waiting for data: {data_advice(run)}"
    if mean.exposed <= EXPOSED * mean.step:
        return
    exposed = [row.exposed for row in rows]
    waiting = mean.exposed - min(exposed)
    if waiting > min(exposed):
        yield (
            f"{waiting:.2f} of {mean.exposed:.2f} ms of exposed communication are waiting for a slower rank, rank "
            f"{exposed.index(min(exposed))}: compare its figures above; rankzero doctor looks at its machine"
        )
    else:
        yield f"{mean.exposed / mean.step:.0%} of a step is exposed communication: {'; '.join(less_communication(run))}"


def about_device(run: Run, mean: Figures) -> Iterator[str]:
    """For copies, and for the next operation."""
    group = STRATEGIES[run.config.strategy].options_group
    offloads = group is not None and getattr(getattr(run.config, group), "cpu_offload", False)
    if mean.exposed_copies > COPIES * mean.step:
        what = (
            f"{group}.cpu_offload=false, if memory allows"
            if offloads
            else "look for .item(), .cpu() and .to() in the recipe"
        )
        yield f"{mean.exposed_copies / mean.step:.0%} of a step is copying between host and device: {what}"
    if mean.idle > IDLE * mean.step:
        what = (
            "outside of operations (Python)"
            if run.world.device == "cpu"
            else "idle: the GPU waits for the host"
        )
        yield f"{mean.idle / mean.step:.0%} of a step is {what}: {'; '.join(fuller(run))}"


def less_communication(run: Run) -> Iterator[str]:
    """Keys that lessen or hide it."""
    config, batch_plan, larger = run.config, run.batch_plan, larger_micro_batch(run.batch_plan)
    group = STRATEGIES[config.strategy].options_group
    if group == "ddp":
        if config.ddp.compress == "none":
            yield "ddp.compress=bf16 halves it (gradients are rounded)"
        if larger:
            yield f"{larger} leaves a longer backward to hide it behind, if memory allows"
    elif group == "fsdp":
        if config.fsdp.sync_every_micro_batch and batch_plan.accumulation_steps > 1:
            yield "fsdp.sync_every_micro_batch=false reduces once a step"
        if config.fsdp.shard == "full":
            yield "fsdp.shard=grad gathers parameters once a step, if memory allows"
            if run.world.world_size > run.world.local_world_size:
                yield "fsdp.shard=hybrid gathers them within a node"
            if larger:
                yield f"{larger} gathers them for fewer micro-batches"
    elif group == "zero":
        if config.strategy == "zero3":
            yield "strategy=zero2 gathers no parameters, if memory allows"
        if larger:
            yield f"{larger} makes fewer micro-batches of a step, if memory allows"
    yield f"a larger batch_size (now {batch_plan.batch_size}) communicates less often; that changes the training"


def fuller(run: Run) -> Iterator[str]:
    """Keys that leave less time between kernels, or operations."""
    larger = larger_micro_batch(run.batch_plan)
    if larger:
        yield f"{larger} makes fewer and larger operations of the same step, if memory allows"
    if not run.config.compile:
        graphs = run.world.device != "cpu" and run.batch_plan.accumulation_steps == 1
        yield f"compile=true{' or compile=reduce-overhead' * graphs} fuses small operations"
    if not larger:
        yield f"a larger batch_size (now {run.batch_plan.batch_size}) makes larger operations; that changes the training"


def larger_micro_batch(batch_plan: BatchPlan) -> str:
    """The next larger micro-batch that fits the same global batch; empty if there is none."""
    divisor = next(
        (n for n in range(2, batch_plan.accumulation_steps + 1) if batch_plan.accumulation_steps % n == 0),
        None,
    )
    return f"micro_batch_size={batch_plan.micro_batch_size * divisor}" if divisor else ""
