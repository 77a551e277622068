"""The failure report on an exception: the user's frames, the batch, the memory, and what often helps."""

from __future__ import annotations

import errno
import linecache
import os
import socket
import sysconfig
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
from rich.filesize import decimal

from launch.runtime.wording import shape_text
from launch.watchdog.failure_report import FailureReport

if TYPE_CHECKING:
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

LAUNCH = Path(__file__).resolve().parents[1]
OURS = (f"{LAUNCH}{os.sep}", f"{LAUNCH.parent / 'strategies'}{os.sep}")
LIBRARIES = (
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",  # <string>, <frozen importlib>
)
"""where code lies that neither the user nor we wrote"""


def is_user_frame(frame: FrameType) -> bool:
    """Whether a frame is the recipe's (a built-in one counts too), or of a module that it uses, not torch's
    or ours.
    """
    name = str(frame.f_globals.get("__name__", ""))
    if name == "recipes.base":
        return False
    return name.startswith("recipe") or not frame.f_code.co_filename.startswith((*OURS, *LIBRARIES))


def from_exception(error: BaseException, world: World, phase: Phase) -> FailureReport:
    """The report on an exception of this rank."""
    return FailureReport(
        kind="exception",
        **origin(world, phase),
        error=type(error).__name__,
        message=str(error),
        frames=list(frames_of(error)),
        traceback=traceback.format_exception(error),
        batch=", ".join(shapes(phase.batches[0])) if phase.batches else "",
        memory=memory_usage(world),
        hint=hint(error),
    )


def from_message(error: BaseException, world: World, phase: Phase) -> FailureReport:
    """The report on an error whose message says it all, the same on all ranks: no rank and no frames."""
    return FailureReport(
        kind="words",
        **(origin(world, phase) | {"rank": None}),
        error=type(error).__name__,
        message=str(error),
        frames=[],
        traceback=traceback.format_exception(error),
        batch="",
        memory="",
        hint=hint(error),
    )


def origin(world: World, phase: Phase) -> dict[str, Any]:
    """This rank and its phase, as fields of a report."""
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "device": world.device,
        "step": phase.step or None,
        "phase": phase.name,
        "time": round(time.time(), 3),
    }


def frames_of(error: BaseException) -> Iterator[str]:
    """The traceback from the user's own code on; its last few frames if there is none."""
    stack = list(traceback.walk_tb(error.__traceback__))
    users = (index for index, (frame, _) in enumerate(stack) if is_user_frame(frame))
    for frame, line in stack[next(users, max(len(stack) - 3, 0)) :]:
        name = frame.f_code.co_filename
        code = linecache.getline(name, line).strip()
        yield f'File "{name}", line {line}, in {frame.f_code.co_name}\n  {code}'


def innermost_frame(frame: FrameType | None) -> str:
    """`file:line in function` of the innermost frame that is the user's or ours; empty if there is none."""
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def shapes(batch: Any) -> Iterator[str]:
    """The tensors of a batch: `64 x 3 x 32 x 32 float32`."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        yield f"{shape_text(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    elif isinstance(batch, Mapping):
        for name, part in batch.items():
            yield from (f"{name} {shape}" for shape in shapes(part))
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from shapes(part)


def memory_usage(world: World) -> str:
    """How much memory is used, of the host and of the GPU."""
    host, process = psutil.virtual_memory(), psutil.Process().memory_info()
    text = f"{decimal(process.rss)} by this process, {decimal(host.available)} of {decimal(host.total)} free"
    if world.device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(world.device)
        peak = torch.cuda.max_memory_allocated(world.device)
        text += (
            f"; {world.device}: {decimal(free)} of {decimal(total)} free, at most {decimal(peak)} were used "
            "by "
            "tensors"
        )
    return text


# what often helps -------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""in the message of an allocation that failed, on a GPU or a CPU"""
HINTS = (
    (
        OUT_OF_MEMORY,
        "micro_batch_size=auto finds one that fits (accumulation follows, the curve stays); or "
        "activation_checkpointing=true, or shard more (strategy=fsdp, zero3)",
    ),
    (
        ("EADDRINUSE", "Address already in use"),
        "another run has the port, or what is left of one: choose another MASTER_PORT",
    ),
    (("No space left on device", "Disk quota exceeded"), "make room, or write elsewhere (run_dir=)"),
    (
        ("device-side assert",),
        "an index out of range, often a class or token: CUDA_LAUNCH_BLOCKING=1, or debug=true on the CPU",
    ),
    (
        ("DataLoader worker", "bus error"),
        "a data worker was killed: too little memory or /dev/shm (workers=0 needs none)",
    ),
    (
        ("NCCL", "ncclInternalError", "ncclSystemError"),
        "NCCL_DEBUG=INFO says more; `rankzero doctor` tests the network",
    ),
    (("Too many open files",), "ulimit -n 65536, or fewer workers="),
)
"""parts of error messages, and what helps"""


def hint(error: BaseException) -> str:
    """What often helps; empty if nothing is known."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " No space left on device"
    return next((advice for parts, advice in HINTS if any(part in text for part in parts)), "")
