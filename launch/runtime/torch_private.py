"""Every undocumented name of torch and Python that `launch/` touches, each with the reason; looked up when
used.

The strategies have a file of their own: `strategies/torch_compat.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def frame_of_thread(thread: int) -> FrameType | None:
    """The innermost frame of another thread, by its `ident`.

    `sys._current_frames` is documented, for specialized purposes: no other call looks into another thread.
    """
    return sys._current_frames().get(thread)


def nccl_flight_recorder() -> Any:
    """NCCL's record of the collectives that have not ended; None where this torch has none.

    It says of a hang which collective waits, and for which shapes. torch documents the recorder and its
    environment variables, but not the call that reads it from Python.
    """
    try:
        from torch._C import _distributed_c10d

        dump: Any = _distributed_c10d._dump_nccl_trace_json  # type: ignore[attr-defined]  # only with NCCL
        return json.loads(dump(includeCollectives=True, onlyActive=True))
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None


def all_gather_single() -> Callable[..., Any]:
    """The all-gather into one tensor: torch 2.14 renames it, and deprecates the name that older versions
    have.
    """
    import torch.distributed as dist

    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather


def seed_host_generator(seed: int) -> None:
    """Seed torch's default generator of the host.

    `torch.manual_seed` is the documented way; without a GPU it notes a traceback for later in each call, half
    a millisecond a step. `torch.default_generator` is exported by torch, but not documented.
    """
    import torch

    torch.default_generator.manual_seed(seed)
