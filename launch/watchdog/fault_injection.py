"""Fault injection: `chaos=KIND:rank=R,step=S` makes a fault really happen, to see the report and the recovery
before a cluster shows them.

It is injected in the forward pass of step S on rank R, and in the first attempt of a run only: what comes
after is the recovery.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.checkpoint.directory import list_checkpoints
from launch.cli.fault_syntax import parse_fault
from launch.runtime.restarts import restart_count

if TYPE_CHECKING:
    from launch.state.run import Run

SLOW_S = 0.5
"""seconds that each forward pass of a slow rank takes longer"""
Inject = Callable[["Run", Path], object]


def install(run: Run, run_dir: Path) -> None:
    """Inject the fault that `chaos=` asks for when its step comes, on its rank, in the first attempt."""
    if run.config.chaos is None or run.progress.step > 0 or restart_count(os.environ):
        return
    fault = parse_fault(run.config.chaos)
    if fault.rank != run.world.rank:
        return
    inject, lasts = FAULTS[fault.kind], fault.kind == "slow"

    def on_enter(phase: str) -> None:
        step = run.phase.step
        if phase == "forward" and (step == fault.step or (lasts and step > fault.step)):
            inject(run, run_dir)

    run.phase.on_enter = on_enter


# the kinds --------------------------------------------------------------------------------------------------


def kill(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """As the out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def stall(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """As a read from a file system that hangs."""
    while True:
        time.sleep(1)


def slow(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """As a GPU that runs hot."""
    time.sleep(SLOW_S)


def nan(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """From a module of the model, as a learning rate too high."""
    import torch

    step = run.progress.step

    def spoil(module: Any, inputs: Any, output: Any) -> Any:  # noqa: ARG001
        spoilt = isinstance(output, torch.Tensor) and output.is_floating_point() and run.progress.step == step
        return output * float("nan") if spoilt else output

    modules = next(iter(run.strategies.values())).module.modules()
    leaf = next(module for module in modules if not list(module.children()))
    leaf.register_forward_hook(spoil)


def sigterm(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """As a scheduler that wants the node back."""
    os.kill(os.getpid(), signal.SIGTERM)


def torn_checkpoint(run: Run, run_dir: Path) -> None:
    """The newest checkpoint loses half of a file, as a disk may after a power failure, and the process is
    killed.
    """
    if checkpoints := list_checkpoints(run_dir):
        file = min(checkpoints[-1].glob("*.safetensors"))
        os.truncate(file, file.stat().st_size // 2)
    kill(run, run_dir)


def oom(run: Run, run_dir: Path) -> None:  # noqa: ARG001
    """By asking for more memory than there is."""
    import torch

    torch.empty(2**50, dtype=torch.uint8, device=run.world.device)


FAULTS: dict[str, Inject] = {
    "kill": kill,
    "stall": stall,
    "slow": slow,
    "nan": nan,
    "sigterm": sigterm,
    "torn_checkpoint": torn_checkpoint,
    "oom": oom,
}
"""by the kinds of `launch.cli.fault_syntax`"""
