"""What the events of a GPU mean: made by hand, as there is no GPU here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # its stubs forget it
from torch.autograd.profiler_util import FunctionEvent

from launch.profiling.events import (
    PHASE_PREFIX,
    STEP_MARK,
    break_down_steps,
    host_phase_times,
    kind_of_kernel,
    operation_times,
)
from launch.profiling.timeline import Kind, TimeBreakdown

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def make_event(
    name: str, thread: int, start: float, end: float, mark: bool, device: DeviceType
) -> FunctionEvent:
    """As torch makes them, whose constructor has no types."""
    return FunctionEvent(  # type: ignore[no-untyped-call]
        0, name, thread, start, end, device_type=device, use_device="cuda", is_user_annotation=mark
    )


def on_host(
    name: str, start: float, end: float, kernels: Sequence[tuple[str, float]] = (), mark: bool = False
) -> FunctionEvent:
    event = make_event(name, 1, start, end, mark, DeviceType.CPU)
    for kernel, duration in kernels:
        event.append_kernel(kernel, 0, duration)  # type: ignore[no-untyped-call]
    return event


def on_gpu(name: str, start: float, end: float, mark: bool = False) -> FunctionEvent:
    return make_event(name, 7, start, end, mark, DeviceType.CUDA)


def two_steps() -> Iterator[FunctionEvent]:
    """Each 100 long, from 1000 on: a copy, two multiplications, an all-reduce beside the second one, a
    compiled kernel.
    """
    yield on_gpu("before", 900, 1015)
    for begin in (1000, 1100):
        yield on_host(STEP_MARK, begin, begin + 100, mark=True)
        yield on_gpu(STEP_MARK, begin + 5, begin + 95, mark=True)  # its shadow
        yield on_host(f"{PHASE_PREFIX}forward", begin, begin + 30, mark=True)
        yield on_gpu(f"{PHASE_PREFIX}forward", begin + 10, begin + 40, mark=True)
        copied, product = "Memcpy HtoD (Pinned -> Device)", "sm90_xmma_gemm_f32f32"
        yield on_host("aten::copy_", begin, begin + 2, [(copied, 10)])
        yield on_gpu(copied, begin + 10, begin + 20)
        yield on_host("aten::mm", begin + 2, begin + 4, [(product, 20), (product, 20)])
        yield on_gpu(product, begin + 20, begin + 40)
        yield on_gpu(product, begin + 40, begin + 60)
        yield on_host("record_param_comms", begin + 4, begin + 6, [(ALL_REDUCE, 25)])
        yield on_gpu(ALL_REDUCE, begin + 50, begin + 75)
        yield on_gpu("nccl:all_reduce", begin + 50, begin + 75, mark=True)
        yield on_gpu("Stream Wait Event", begin + 75, begin + 80)
        yield on_gpu("triton_poi_fused_gelu_0", begin + 80, begin + 90)


def test_kernels_beside_communication_hide_it() -> None:
    found = break_down_steps(list(two_steps()), gpu=True)
    assert found == TimeBreakdown(
        compute=115, communication=50, exposed_communication=30, copies=20, exposed_copies=15, idle=40
    )
    assert found.compute + found.exposed_communication + found.exposed_copies + found.idle == 200


def test_the_shadow_of_a_phase_on_the_gpu_is_not_counted_again() -> None:
    assert host_phase_times(two_steps()) == {"forward": 60}


def test_kernels_stand_under_the_operation_that_launched_them() -> None:
    assert operation_times(list(two_steps()), gpu=True) == [
        ("before", 1, 115),
        ("aten::mm", 4, 80),
        (ALL_REDUCE, 2, 50),
        ("Memcpy HtoD (Pinned -> Device)", 2, 20),
        ("triton_poi_fused_gelu_0", 2, 20),
    ]


def test_a_profiler_that_recorded_no_step_says_so() -> None:
    with pytest.raises(RuntimeError, match="recorded no step"):
        break_down_steps([on_gpu("alone", 0, 1)], gpu=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (ALL_REDUCE, "communication"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)", "communication"),
        ("ncclSymkDevKernel_ReduceScatter_LL_sum_f32", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("Memcpy DtoD (Device -> Device)", "compute"),
        ("Memset (Device)", "compute"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)",
            "compute",
        ),
        ("Event Sync", None),
    ],
)
def test_what_runs_on_a_gpu_is_known_by_name(name: str, kind: Kind | None) -> None:
    assert kind_of_kernel(name) == kind
