"""Which keys may make a step faster, from where its time goes. Only keys that exist, and that are not already
set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launch.profiling.measure import RankStepTimes
from launch.reporting.throughput import SLOW_DATA, data_advice
from strategies import STRATEGIES

if TYPE_CHECKING:
    from launch.data.batch_plan import BatchPlan
    from launch.state.run import Run

EXPOSED_SHARE, IDLE_SHARE, COPIES_SHARE = 0.10, 0.20, 0.05
"""of a step, from which on something is suggested"""
PROFILER_OVERHEAD = 0.25
"""that the profiler may add to a step before the shares are called into question"""


def mean_times(ranks: Sequence[RankStepTimes]) -> RankStepTimes:
    """The mean over the ranks."""
    return RankStepTimes(*(sum(column) / len(ranks) for column in zip(*ranks, strict=True)))


def suggest(run: Run, ranks: Sequence[RankStepTimes]) -> Iterator[str]:
    """What may help, the most promising first; `ranks` are the times of each rank, in order."""
    mean, gpu = mean_times(ranks), run.world.device != "cpu"
    if gpu and not mean.compute:
        yield (
            "the profiler saw no kernel on the GPU: KINETO_LOG_LEVEL=0 says why (no access to CUPTI, or "
            "another profiler?)"
        )
        return
    suggestions = [*for_waiting(run, ranks), *for_device(run, mean)]
    if mean.step > (1 + PROFILER_OVERHEAD) * mean.unprofiled_step:
        suggestions.append(
            f"the profiler makes a step {mean.step / mean.unprofiled_step - 1:.0%} longer: there are many "
            "small operations, and their true share is smaller"
        )
    faster = "; precision=bf16 or tf32 computes faster" if gpu and run.config.precision == "fp32" else ""
    share = mean.compute / mean.step
    yield from suggestions or [f"nothing stands out: {share:.0%} of a step is computing{faster}"]


def for_waiting(run: Run, ranks: Sequence[RankStepTimes]) -> Iterator[str]:
    """Against waiting for data, for other ranks, for the network."""
    mean, gpu = mean_times(ranks), run.world.device != "cpu"
    if mean.data > SLOW_DATA * mean.step and (not gpu or mean.idle > SLOW_DATA * mean.step):
        yield f"{mean.data / mean.step:.0%} of a step is waiting for data: {data_advice(run)}"
    if mean.exposed_communication <= EXPOSED_SHARE * mean.step:
        return
    exposed = [times.exposed_communication for times in ranks]
    transfer = min(exposed)  # at most: the rank that waits least
    waiting = mean.exposed_communication - transfer
    if waiting > transfer:
        yield (
            f"{waiting:.2f} of {mean.exposed_communication:.2f} ms of exposed communication are waiting "
            f"for a slower rank, rank {exposed.index(transfer)}: compare its times above; `rankzero "
            "doctor` checks its machine"
        )
    else:
        keys = "; ".join(less_communication(run))
        yield f"{mean.exposed_communication / mean.step:.0%} of a step is exposed communication: {keys}"


def for_device(run: Run, mean: RankStepTimes) -> Iterator[str]:
    """Against copies, and against an idle device."""
    group = STRATEGIES[run.config.strategy].options_group
    if mean.exposed_copies > COPIES_SHARE * mean.step:
        offloads = group is not None and getattr(getattr(run.config, group), "cpu_offload", False)
        fix = "look for .item(), .cpu() and .to() in the recipe"
        if offloads:
            fix = f"{group}.cpu_offload=false, if memory allows"
        yield f"{mean.exposed_copies / mean.step:.0%} of a step is copying between host and device: {fix}"
    if mean.idle > IDLE_SHARE * mean.step:
        cause = "idle: the GPU waits for the host"
        if run.world.device == "cpu":
            cause = "outside of operations (Python)"
        yield f"{mean.idle / mean.step:.0%} of a step is {cause}: {'; '.join(less_idle_time(run))}"


def less_communication(run: Run) -> Iterator[str]:
    """Keys that reduce or hide communication."""
    config, plan = run.config, run.batch_plan
    group, larger = STRATEGIES[config.strategy].options_group, larger_micro_batch(plan)
    if group == "ddp":
        if config.ddp.compress == "none":
            yield "ddp.compress=bf16 halves it (gradients are rounded)"
        if larger:
            yield f"{larger} leaves a longer backward to hide it behind, if memory allows"
    elif group == "fsdp":
        if config.fsdp.sync_every_micro_batch and plan.accumulation_steps > 1:
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
    yield f"a larger batch_size (now {plan.batch_size}) communicates less often, but changes the training"


def less_idle_time(run: Run) -> Iterator[str]:
    """Keys that leave less time between kernels, or operations."""
    plan, larger = run.batch_plan, larger_micro_batch(run.batch_plan)
    if larger:
        yield f"{larger} makes fewer and larger operations of the same step, if memory allows"
    if not run.config.compile:
        graphs = run.world.device != "cpu" and plan.accumulation_steps == 1
        yield f"compile=true{' or compile=reduce-overhead' * graphs} fuses small operations"
    if not larger:
        yield f"a larger batch_size (now {plan.batch_size}) makes larger operations, but changes the training"


def larger_micro_batch(plan: BatchPlan) -> str:
    """The next larger micro-batch that fits the same global batch, as a key; empty if there is none."""
    steps = plan.accumulation_steps
    divisor = next((n for n in range(2, steps + 1) if steps % n == 0), None)
    return f"micro_batch_size={plan.micro_batch_size * divisor}" if divisor else ""
