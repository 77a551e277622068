"""What is said of a failure: one block on the screen, the same in failure.json. It names rank, host, step,
phase and line.
"""

from __future__ import annotations

import errno
import json
import linecache
import os
import socket
import sysconfig
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
from rich.filesize import decimal

from launch.runtime.text import shape_text

if TYPE_CHECKING:
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

FILE, FORMER = "failure.json", "failure.former.json"
FailureReport = dict[str, Any]

HERE = Path(__file__).resolve().parents[2]
LIBRARIES = tuple(
    {f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {f"{HERE}{os.sep}", f"{HERE.parent / 'strategies'}{os.sep}", "<"}
)
"""where code lies that its user did not write"""


def is_users(frame: FrameType) -> bool:
    """Whether a frame is the recipe's (a built-in one counts too), or of a module that it uses, not torch's
    or ours.
    """
    name = str(frame.f_globals.get("__name__", ""))
    if name == "recipes.base":
        return False
    return name.startswith("recipe") or not frame.f_code.co_filename.startswith(LIBRARIES)


def from_exception(error: BaseException, world: World, phase: Phase) -> FailureReport:
    """The verdict on an exception of this rank."""
    return {
        "kind": "exception",
        **origin(world, phase),
        "error": type(error).__name__,
        "message": str(error),
        "frames": list(frames_of(error)),
        "traceback": traceback.format_exception(error),
        "batch": ", ".join(shapes(phase.batches[0])) if phase.batches else "",
        "memory": memory(world),
        "hint": hint(error),
    }


def origin(world: World, phase: Phase) -> FailureReport:
    """This rank, and where it is."""
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
    first = next((index for index, (frame, _) in enumerate(stack) if is_users(frame)), max(len(stack) - 3, 0))
    for frame, line in stack[first:]:
        name = frame.f_code.co_filename
        yield f'File "{name}", line {line}, in {frame.f_code.co_name}\n  {linecache.getline(name, line).strip()}'


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


def memory(world: World) -> str:
    """How much memory is used, of the host and of the GPU."""
    host = psutil.virtual_memory()
    text = f"{decimal(psutil.Process().memory_info().rss)} by this process, {decimal(host.available)} of {decimal(host.total)} free"
    if world.device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(world.device)
        peak = torch.cuda.max_memory_allocated(world.device)
        text += f"; {world.device}: {decimal(free)} of {decimal(total)} free, at most {decimal(peak)} were used by tensors"
    return text


NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""words in the message of an allocation that failed, on a GPU or a CPU"""
HINTS = (
    (NO_MEMORY, "micro_batch_size=auto finds one that fits (accumulation follows, the curve "
     "stays); or activation_checkpointing=true, or shard more (strategy=fsdp, zero3)"),
    (("EADDRINUSE", "Address already in use"), "another run has the port, or what is left of one: choose another MASTER_PORT"),
    (("No space left on device", "Disk quota exceeded"), "make room, or write elsewhere (run_dir=)"),
    (("device-side assert",), "an index out of range, often a class or token: CUDA_LAUNCH_BLOCKING=1, or debug=true on the CPU"),
    (("DataLoader worker", "bus error"), "a data worker was killed: too little memory or /dev/shm (workers=0 needs none)"),
    (("NCCL", "ncclInternalError", "ncclSystemError"), "NCCL_DEBUG=INFO says more; launch/commands/doctor.py tests the network"),
    (("Too many open files",), "ulimit -n 65536, or fewer workers="),
)  # fmt: skip
"""words in an error, and what helps"""


def hint(error: BaseException) -> str:
    """What often helps; empty if we know of nothing."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " No space left on device"
    return next((words for signs, words in HINTS if any(sign in text for sign in signs)), "")


# on the screen ----------------------------------------------------------------------------------------------


def render(verdict: FailureReport, run_dir: Path | None) -> str:
    """The lines for the screen."""
    lines = [f"rankzero: {headline(verdict)}"]
    for frame in verdict.get("frames", ()):
        lines += [f"  {line}" for line in frame.splitlines()]
    for name in ("batch", "memory", "hint"):
        if verdict.get(name):
            lines.append(f"  {name:<8}{verdict[name]}")
    lines += [f"  {line}" for line in verdict.get("ranks", ())]
    if run_dir is not None:
        lines.append(f"  more in {run_dir / FILE}")
    return "\n".join(lines)


def headline(verdict: FailureReport) -> str:
    """The first line: who, where, what."""
    if verdict["kind"] != "exception":
        return str(verdict["message"])
    device = "" if verdict["device"] == "cpu" else f" ({verdict['device']})"
    step = "" if verdict["step"] is None else f", step {verdict['step']}"
    return f"rank {verdict['rank']} on {verdict['host']}{device}{step}, {verdict['phase']}: {verdict['error']}: {verdict['message']}"


def for_torchrun(verdict: FailureReport) -> None:
    """Let torchrun's own report, which follows ours, name the cause too, instead of `traceback: to enable,
    see ...`.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"py_callstack": render(verdict, None), "timestamp": str(int(verdict["time"]))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": headline(verdict), "extraInfo": told}}))


def write_once(verdict: FailureReport, run_dir: Path) -> bool:
    """Write failure.json if there is none; whether this was the first. A disk that cannot be written to hides
    nothing.

    It says how often in a row lives of the run have failed like this: `run_dir.refuse_to_loop` reads it.
    """
    try:
        former = json.loads((run_dir / FORMER).read_text())
    except (OSError, ValueError):
        former = {}
    same = all(former.get(key) == verdict.get(key) for key in ("kind", "step", "error", "message"))
    verdict = {
        **verdict,
        "repeated": former.get("repeated", 1) + 1 if same and verdict["kind"] == "exception" else 1,
    }
    try:
        with (run_dir / FILE).open("x") as file:
            json.dump(verdict, file, indent=1)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
