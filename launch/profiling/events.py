"""What the events of torch's profiler mean: which compute, which communicate, how long each operation took;
in microseconds.

On a GPU the events on the device count: kernels, copies. On a CPU those of the thread that trains; what gloo
is about stands in the trace from the moment that it is asked for until it is done, whoever waits for it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # its stubs forget it
from torch.autograd.profiler_util import FunctionEvent

from launch.profiling.timeline import Kind, Split, split

STEP = "ProfilerStep*"
"""torch's own mark of a step"""
PHASE = "phase: "
NCCL = re.compile(r"\bnccl\w*Kernel")
"""ncclDevKernel_AllReduce_..., ncclKernel_... before NCCL 2.19, ncclSymkDevKernel_... since 2.27"""
SYNC = re.compile(r"(Context|Event|Stream|Unknown) Sync|Stream Wait Event")
"""events on the device in which nothing runs"""
AROUND = ("autograd::engine::", "torch::autograd::", "c10d::", "_c10d_functional::")
"""operations that do not compute themselves, and in which hooks may wait for other ranks"""


def kind_of_kernel(name: str) -> Kind | None:
    """What an event on the device does; None: it waits."""
    if NCCL.search(name) or name.startswith("Memcpy PtoP"):
        return "communication"
    if name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
        return "copies"
    return None if SYNC.match(name) else "computing"


def kind_of_operation(event: FunctionEvent, thread: int) -> Kind | None:
    """What an event on the CPU does for the one that trains, `thread`; None: nothing that counts, or what
    stands around it.
    """
    if event.device_type != DeviceType.CPU:
        return None
    if event.name.startswith("gloo:"):
        return "communication"
    if event.is_async or event.is_user_annotation or event.thread != thread:
        return None
    return "computing" if computes(event.name) or "CompiledFxGraph" in event.name else None


def computes(name: str) -> bool:
    """Whether it is the name of an operation (aten::mm) that does something itself."""
    return "::" in name and not name.startswith(AROUND)


def taken(event: FunctionEvent) -> float:
    """From its start to its end."""
    return float(event.time_range.end - event.time_range.start)


def on_device(event: FunctionEvent) -> bool:
    """Whether the event is one of the GPU, and not the shadow there of a range that was marked on the host."""
    return bool(event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def steps_of(events: Iterable[FunctionEvent]) -> list[FunctionEvent]:
    """The marks of the steps that were recorded, as the host saw them. Raises RuntimeError if there are none."""
    found = [event for event in events if event.name == STEP and event.device_type == DeviceType.CPU]
    if not found:
        raise RuntimeError(
            "the profiler has recorded no step: are its buffers full? profile_steps=1 needs less"
        )
    return found


def split_of(events: Sequence[FunctionEvent], gpu: bool) -> Split:
    """How the steps were used."""
    steps = steps_of(events)
    begin, end = min(step.time_range.start for step in steps), max(step.time_range.end for step in steps)
    thread = steps[0].thread
    kinds = (
        (
            event,
            (kind_of_kernel(event.name) if on_device(event) else None)
            if gpu
            else kind_of_operation(event, thread),
        )
        for event in events
    )
    return split(
        ((event.time_range.start, event.time_range.end, kind) for event, kind in kinds if kind), begin, end
    )


def phases_of(events: Iterable[FunctionEvent]) -> Mapping[str, float]:
    """The time that the host spent in each phase of the steps; 0 for any other."""
    times = defaultdict[str, float](float)
    for event in events:
        if event.name.startswith(PHASE) and event.device_type == DeviceType.CPU:
            times[event.name.removeprefix(PHASE)] += taken(event)
    return times


def operations_of(events: Sequence[FunctionEvent], gpu: bool) -> list[tuple[str, int, float]]:
    """Name, calls and time of each operation without what it calls in turn, the dearest first. On a GPU a
    call is a kernel.
    """
    calls, times = Counter[str](), defaultdict[str, float](float)
    for name, time in by_kernel(events) if gpu else by_operation(events, steps_of(events)[0].thread):
        calls[name] += 1
        times[name] += time
    return [(name, calls[name], times[name]) for name in sorted(times, key=lambda name: -times[name])]


def by_operation(events: Iterable[FunctionEvent], thread: int) -> Iterator[tuple[str, float]]:
    """The operations of a CPU, and the collectives from their start to their end."""
    for event in events:
        kind = kind_of_operation(event, thread)
        if kind:
            yield event.name, taken(event) if kind == "communication" else event.self_cpu_time_total


def by_kernel(events: Sequence[FunctionEvent]) -> Iterator[tuple[str, float]]:
    """The kernels of a GPU under the name of the operation that launched them; communication and copies under
    their own.

    What was compiled, or recorded as a CUDA graph, was launched by no such operation: it has no other name
    than its kernel's.
    """
    known = defaultdict[str, float](float)
    for event in events:
        for kernel in event.kernels:
            kind = kind_of_kernel(kernel.name)
            if kind:
                known[kernel.name] += kernel.duration
                yield (
                    event.name if kind == "computing" and computes(event.name) else kernel.name,
                    kernel.duration,
                )
    for event in events:
        if not on_device(event) or kind_of_kernel(event.name) is None:
            continue
        time = taken(event)
        if known[event.name] > time / 2:
            known[event.name] -= time
        else:
            yield event.name, time
