"""What the events of torch's profiler mean: which compute, which communicate, how long each operation took;
in microseconds.

On a GPU the events on the device count: kernels, copies. On a CPU those of the training thread; gloo's work
lasts in the trace from the moment that it is requested until it is done, whoever waits for it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # its stubs forget it

from launch.profiling.timeline import Kind, TimeBreakdown, break_down

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

STEP_MARK = "ProfilerStep*"
"""torch's own mark of a step"""
PHASE_PREFIX = "phase: "
NCCL_KERNEL = re.compile(r"\bnccl\w*Kernel")
"""ncclDevKernel_AllReduce_..., ncclKernel_... before NCCL 2.19, ncclSymkDevKernel_... since 2.27"""
SYNCHRONIZATION = re.compile(r"(Context|Event|Stream|Unknown) Sync|Stream Wait Event")
"""events on the device in which nothing runs"""
WRAPPER_PREFIXES = ("autograd::engine::", "torch::autograd::", "c10d::", "_c10d_functional::")
"""operations that do not compute themselves, and in which hooks may wait for other ranks"""


class OperationTime(NamedTuple):
    """All calls of an operation in the recorded steps."""

    name: str
    calls: int
    """on a GPU a call is a kernel"""
    microseconds: float
    """without the operations that it calls in turn"""


def kind_of_kernel(name: str) -> Kind | None:
    """What an event on the device does; None: it waits."""
    if NCCL_KERNEL.search(name) or name.startswith("Memcpy PtoP"):
        return "communication"
    if name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
        return "copies"
    return None if SYNCHRONIZATION.match(name) else "compute"


def kind_of_cpu_event(event: FunctionEvent, training_thread: int) -> Kind | None:
    """What an event on the CPU does for the training thread; None: nothing that counts, or it only contains
    others.
    """
    if event.device_type != DeviceType.CPU:
        return None
    if event.name.startswith("gloo:"):
        return "communication"
    if event.is_async or event.is_user_annotation or event.thread != training_thread:
        return None
    return "compute" if is_compute_operation(event.name) or "CompiledFxGraph" in event.name else None


def is_compute_operation(name: str) -> bool:
    """Whether it is the name of an operation (aten::mm) that does something itself."""
    return "::" in name and not name.startswith(WRAPPER_PREFIXES)


def duration_us(event: FunctionEvent) -> float:
    """From its start to its end."""
    return float(event.time_range.end - event.time_range.start)


def is_on_gpu(event: FunctionEvent) -> bool:
    """Whether the event is one of the GPU, and not the copy there of a range that was marked on the host."""
    return bool(event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def step_marks(events: Iterable[FunctionEvent]) -> list[FunctionEvent]:
    """The marks of the recorded steps on the host. Raises RuntimeError if there are none."""
    marks = [e for e in events if e.name == STEP_MARK and e.device_type == DeviceType.CPU]
    if not marks:
        raise RuntimeError(
            "the profiler has recorded no step: are its buffers full? profile_steps=1 needs less"
        )
    return marks


def break_down_steps(events: Sequence[FunctionEvent], gpu: bool) -> TimeBreakdown:
    """How the recorded steps were used, on the GPU or on the CPU."""
    steps = step_marks(events)
    begin, end = min(step.time_range.start for step in steps), max(step.time_range.end for step in steps)
    thread = steps[0].thread
    activities = []
    for event in events:
        if gpu:
            kind = kind_of_kernel(event.name) if is_on_gpu(event) else None
        else:
            kind = kind_of_cpu_event(event, thread)
        if kind:
            activities.append((event.time_range.start, event.time_range.end, kind))
    return break_down(activities, begin, end)


def host_phase_times(events: Iterable[FunctionEvent]) -> Mapping[str, float]:
    """The time that the host spent in each phase of the steps; 0 for any other."""
    times = defaultdict[str, float](float)
    for event in events:
        if event.name.startswith(PHASE_PREFIX) and event.device_type == DeviceType.CPU:
            times[event.name.removeprefix(PHASE_PREFIX)] += duration_us(event)
    return times


def operation_times(events: Sequence[FunctionEvent], gpu: bool) -> list[OperationTime]:
    """The time of each operation, the most expensive first."""
    calls, times = Counter[str](), defaultdict[str, float](float)
    named = gpu_operations(events) if gpu else cpu_operations(events, step_marks(events)[0].thread)
    for name, time in named:
        calls[name] += 1
        times[name] += time
    return [OperationTime(name, calls[name], times[name]) for name in sorted(times, key=lambda n: -times[n])]


def cpu_operations(events: Iterable[FunctionEvent], training_thread: int) -> Iterator[tuple[str, float]]:
    """Name and time of the operations of a CPU, and of the collectives from their start to their end."""
    for event in events:
        kind = kind_of_cpu_event(event, training_thread)
        if kind:
            yield event.name, duration_us(event) if kind == "communication" else event.self_cpu_time_total


def gpu_operations(events: Sequence[FunctionEvent]) -> Iterator[tuple[str, float]]:
    """Time of the kernels of a GPU under the name of the operation that launched them; communication and
    copies under their own.

    What was compiled, or recorded as a CUDA graph, was launched by no such operation: it has no other name
    than its kernel's.
    """
    launched = defaultdict[str, float](float)
    for event in events:
        for kernel in event.kernels:
            kind = kind_of_kernel(kernel.name)
            if kind:
                launched[kernel.name] += kernel.duration
                by_operation = kind == "compute" and is_compute_operation(event.name)
                yield event.name if by_operation else kernel.name, kernel.duration
    for event in events:
        if not is_on_gpu(event) or kind_of_kernel(event.name) is None:
            continue
        time = duration_us(event)
        if launched[event.name] > time / 2:
            launched[event.name] -= time
        else:
            yield event.name, time
