"""Where the time of a step goes: intervals, the events of a GPU, what is said of them, and the real command."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from launch.profiling.events import PHASE, STEP, kind_of_kernel, operations_of, phases_of, split_of
from launch.profiling.measure import Figures
from launch.profiling.report import advise, notes, where
from launch.profiling.timeline import Kind, Split, minus, split, union
from launch.state.run import Run
from tests.launch.jobs import alone, job_of
from tests.launch.processes import COMMAND_TIMEOUT_S, LAUNCHER_VARIABLES, ROOT, TINY, rankzero

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
MINE = """
import cProfile  # imports Python's `profile`, not ours
import profile
from dataclasses import dataclass
from tests.launch.tiny import Fit

@dataclass(kw_only=True)
class Mine(Fit):
    kept: str = cProfile.Profile.__name__ + profile.Profile.__name__
"""


# intervals --------------------------------------------------------------------------------------------------


def test_a_union_is_in_order_and_apart() -> None:
    assert union([(5, 6), (1, 3), (2, 4), (4, 5), (8, 8), (9, 7)]) == [(1, 6)]
    assert union([]) == []


def test_what_is_left_of_intervals_without_others() -> None:
    assert minus([(0, 10)], [(2, 3), (5, 7)]) == [(0, 2), (3, 5), (7, 10)]
    assert minus([(0, 2), (4, 6), (8, 9)], [(1, 5)]) == [(0, 1), (5, 6), (8, 9)]
    assert minus([(0, 2), (3, 4)], [(0, 4)]) == []
    assert minus([(1, 2)], []) == [(1, 2)]


def test_communication_is_exposed_where_nothing_computes() -> None:
    found = split(
        [
            (0, 4, "computing"),
            (3, 6, "communication"),
            (5, 7, "communication"),
            (6, 9, "copies"),
            (8, 12, "computing"),
        ],
        0,
        20,
    )
    assert found == Split(computing=8, communication=4, exposed=3, copies=3, exposed_copies=1, idle=8)


def test_only_the_window_counts() -> None:
    assert split([(-5, 1, "computing"), (9, 30, "communication"), (40, 50, "copies")], 0, 10) == Split(
        1, 1, 1, 0, 0, 8
    )


def test_any_intervals_are_split_as_one_would_count_them() -> None:
    draw = random.Random(0)
    kinds: list[Kind] = ["computing", "communication", "copies"]
    for _ in range(200):
        ran = [
            (start := draw.randrange(50), start + draw.randrange(12), draw.choice(kinds))
            for _ in range(draw.randrange(15))
        ]
        at = [{kind for start, end, kind in ran if start <= moment < end} for moment in range(10, 45)]
        assert split(ran, 10, 45) == Split(
            computing=sum("computing" in busy for busy in at),
            communication=sum("communication" in busy for busy in at),
            exposed=sum("communication" in busy and "computing" not in busy for busy in at),
            copies=sum("copies" in busy for busy in at),
            exposed_copies=sum(busy == {"copies"} for busy in at),
            idle=sum(not busy for busy in at),
        )


# events of a GPU --------------------------------------------------------------------------------------------


def on_host(
    name: str, start: float, end: float, kernels: Sequence[tuple[str, float]] = (), mark: bool = False
) -> FunctionEvent:
    event = FunctionEvent(0, name, 1, start, end, use_device="cuda", is_user_annotation=mark)
    for kernel, duration in kernels:
        event.append_kernel(kernel, 0, duration)
    return event


def on_gpu(name: str, start: float, end: float, mark: bool = False) -> FunctionEvent:
    return FunctionEvent(
        0, name, 7, start, end, device_type=DeviceType.CUDA, use_device="cuda", is_user_annotation=mark
    )


def two_steps() -> Iterator[FunctionEvent]:
    """Each 100 long, from 1000 on: a copy, two multiplications, an all-reduce beside the second one, a
    compiled kernel.
    """
    yield on_gpu("before", 900, 1015)
    for begin in (1000, 1100):
        yield on_host(STEP, begin, begin + 100, mark=True)
        yield on_gpu(STEP, begin + 5, begin + 95, mark=True)  # its shadow
        yield on_host(f"{PHASE}forward", begin, begin + 30, mark=True)
        yield on_gpu(f"{PHASE}forward", begin + 10, begin + 40, mark=True)
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
    found = split_of(list(two_steps()), gpu=True)
    assert found == Split(computing=115, communication=50, exposed=30, copies=20, exposed_copies=15, idle=40)
    assert found.computing + found.exposed + found.exposed_copies + found.idle == 200


def test_the_shadow_of_a_phase_on_the_gpu_is_not_counted_again() -> None:
    assert phases_of(two_steps()) == {"forward": 60}


def test_kernels_stand_under_the_operation_that_launched_them() -> None:
    assert operations_of(list(two_steps()), gpu=True) == [
        ("before", 1, 115),
        ("aten::mm", 4, 80),
        (ALL_REDUCE, 2, 50),
        ("Memcpy HtoD (Pinned -> Device)", 2, 20),
        ("triton_poi_fused_gelu_0", 2, 20),
    ]


def test_a_profiler_that_recorded_no_step_says_so() -> None:
    with pytest.raises(RuntimeError, match="recorded no step"):
        split_of([on_gpu("alone", 0, 1)], gpu=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (ALL_REDUCE, "communication"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)", "communication"),
        ("ncclSymkDevKernel_ReduceScatter_LL_sum_f32", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("Memcpy DtoD (Device -> Device)", "computing"),
        ("Memset (Device)", "computing"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)",
            "computing",
        ),
        ("Event Sync", None),
    ],
)
def test_what_runs_on_a_gpu_is_known_by_name(name: str, kind: Kind | None) -> None:
    assert kind_of_kernel(name) == kind


# what is said -----------------------------------------------------------------------------------------------


def figures(**given: float) -> Figures:
    """A step of 100 ms in which nothing stands out, but for what is given."""
    usual = {"plain": 98.0, "step": 100.0, "computing": 90.0, "idle": 10.0, "memory": 1e9}
    return Figures(**{**dict.fromkeys(Figures._fields, 0.0), **usual, **given})


def advice(run: Run, *rows: Figures, gpu: bool = True) -> str:
    return "\n".join(advise(replace(run, world=replace(run.world, device="cuda:0")) if gpu else run, rows))


@pytest.fixture(scope="module")
def run() -> Run:
    return job_of(alone(), "Fit", "batch_size=32", "micro_batch_size=8", "steps=5")


def test_a_step_that_computes_needs_nothing(run: Run) -> None:
    assert (
        advice(run, figures())
        == "nothing stands out: 90% of a step is computing; precision=bf16 or tf32 computes faster"
    )
    assert advice(run, figures(), gpu=False) == "nothing stands out: 90% of a step is computing"


def test_exposed_communication_names_keys_of_the_strategy(run: Run) -> None:
    row = figures(computing=70, exposed=20)
    for strategy, word in {
        "ddp": "ddp.compress=bf16",
        "fsdp": "fsdp.shard=grad",
        "zero3": "strategy=zero2",
    }.items():
        said = advice(replace(run, config=replace(run.config, strategy=strategy)), row, row)
        assert said.startswith("20% of a step is exposed communication")
        assert word in said
        assert "micro_batch_size=16" in said


def test_waiting_for_a_slow_rank_is_no_communication(run: Run) -> None:
    rows = [
        figures(computing=60, communication=30, exposed=30),
        figures(computing=85, communication=5, exposed=5),
    ] * 2
    said = advice(run, *rows)
    assert "12.50 of 17.50 ms of exposed communication are waiting for a slower rank, rank 1" in said
    assert "5.00 ms" in "".join(notes(rows, gpu=True))


def test_an_idle_gpu_is_told_what_fills_it(run: Run) -> None:
    said = advice(run, figures(computing=60, idle=40))
    assert said.startswith("40% of a step is idle")
    assert "compile=true" in said
    waiting = advice(run, figures(computing=60, idle=40, data=30))
    assert waiting.startswith("30% of a step is waiting for data")
    assert "data" not in advice(run, figures(computing=99, idle=1, data=30)), "the host has time to wait"


def test_copies_name_what_offloads(run: Run) -> None:
    row = figures(computing=80, exposed_copies=10)
    assert ".item()" in advice(run, row)
    offloading = replace(run.config, fsdp=replace(run.config.fsdp, cpu_offload=True))
    assert "fsdp.cpu_offload=false" in advice(replace(run, config=offloading), row)


def test_a_gpu_without_a_kernel_was_not_seen(run: Run) -> None:
    assert "saw no kernel" in advice(run, figures(computing=0, idle=100))


def test_the_table_names_the_ranks_with_least_and_most() -> None:
    table = where([figures(exposed=4, communication=6), figures(exposed=1, communication=6)], gpu=True)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("exposed communication", "2.50", "2.5%", "1.00 (1)", "4.00 (0)") in cells
    assert not [row for row in cells if "copies" in str(row[0])], "there are none"


# the command ------------------------------------------------------------------------------------------------


def profile(cwd: Path, *words: str, ranks: int = 0, code: int = 0) -> tuple[str, str]:
    """What the command says, in one line, and what it says on stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    environment = {**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    line = rankzero("profile", *words, ranks=ranks)
    ended = subprocess.run(
        line,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * COMMAND_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return " ".join(ended.stdout.split()), ended.stderr


def shares(said: str, *names: str) -> list[float]:
    return [float(re.search(rf"{name} [\d.]+ ([\d.]+)%", said)[1]) for name in names]  # type: ignore[index]  # it fails then


def trace_in(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def test_a_single_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    said, warned = profile(
        tmp_path, "recipe=./mine.py", "workers=0", "epochs=1", "profile_steps=2", "warmup_steps=1"
    )
    assert not warned
    assert 99.8 < sum(shares(said, "computing", "outside of operations")) < 100.2
    assert 50 < sum(shares(said, "data", "forward", "backward", "optimizer step")) < 100.2
    assert re.search(
        r"rank 0: operations calls a step ms a step share \W+aten::\w+ \d+ [\d.]+ [\d.]+% ", said
    )
    assert "communication" not in said
    (trace,) = (tmp_path / "runs" / "profile" / "mine").glob("*-single-1.json.gz")
    assert str(trace.relative_to(tmp_path)) in said
    events = trace_in(trace)
    assert {"ProfilerStep#1", "ProfilerStep#2", "phase: backward"} <= {event["name"] for event in events}
    assert len([event for event in events if event["name"] == "aten::addmm"]) == 4, "two layers, two steps"
    left = {path.name for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}
    assert left == {"mine.py", "runs", "profile", "mine", trace.name}, "nothing else is written"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_and_the_one_that_others_wait_for(tmp_path: Path, strategy: str) -> None:
    slow = (
        "recipe=tests.launch.tiny:Fit",
        "epochs=1",
        "batch_size=16",
        f"strategy={strategy}",
        "chaos=slow:rank=1,step=1",
    )
    said, _ = profile(tmp_path, *slow, "profile_steps=2", "warmup_steps=1", "trace=t.json.gz", ranks=2)
    assert shares(said, "exposed communication")[0] > 30, "half of the time, on one of two ranks"
    assert "waiting for a slower rank, rank 1" in said
    assert "gloo:all_reduce" in said
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.gz"]
    assert any(event["name"] == "gloo:all_reduce" for event in trace_in(tmp_path / "t.json.gz"))


@pytest.mark.slow
def test_mnist(tmp_path: Path) -> None:
    said, _ = profile(tmp_path, "recipe=mnist", "profile_steps=2", "warmup_steps=1", "trace=null")
    assert "aten::convolution_backward" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    said, warned = profile(
        tmp_path,
        f"recipe={TINY}:Broken",
        "fail=raise",
        "batch_size=10",
        "epochs=1",
        "trace=t.json.gz",
        ranks=2,
        code=1,
    )
    ours = [line for line in warned.splitlines() if line.startswith("rankzero: ")]
    assert len(ours) == 1
    assert re.search(r"rank 1 on .*, step 3, forward: LookupError: the shelf is empty", ours[0])
    assert not said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe=mnist", "profile_step=3"], "profile_step is not a key"),
        (["recipe=mnist", "profile_steps=0"], "profile_steps=0 must be 1 or more"),
        (["recipe=mnist", "trace=t.json"], "must end in .json.gz"),
        (["recipe=mnist", "trace=/proc/t/t.json.gz"], "name another place, or null"),
        (["recipe=mnist", "debug=true"], "debug= has no meaning here"),
        (["recipe=mnist", "micro_batch_size=auto"], "micro_batch_size=auto is found by a run"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    said, warned = profile(tmp_path, *words, code=2)
    assert not said
    assert told in warned
    assert warned.startswith("rankzero: ")
    assert warned.count("\n") == 1


def test_help_imports_no_torch(tmp_path: Path) -> None:
    spy = [sys.executable, "-X", "importtime", "-m", "launch", "profile", "recipe=mnist", "--help"]
    ended = subprocess.run(spy, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "yaml" in imported, "the spy sees nothing"
    assert not imported & {"torch", "numpy", "pydantic", "profile"}
    assert "profile_steps=5" in ended.stdout
    assert "batch_size=64" in ended.stdout
