"""Collectives of a run: sums, rows of each rank's numbers, an object of rank zero, the first error of any
rank.

Each is collective: all ranks call it, in the same order. A single process asks nobody.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from launch.runtime.torch_private import all_gather_single

MESSAGE_BYTES = 1000
"""of an error message that travels between ranks"""


def is_distributed() -> bool:
    """Whether there are other ranks. Not collective."""
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place. Collective."""
    return AsyncSum(value).wait()


class AsyncSum:
    """The sum of `value` over all ranks, in place, under way while other things are done. Collective.

    On a GPU nobody waits for it anyway, and NCCL does not like several groups to be at work at once.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.work = dist.all_reduce(value, async_op=not value.is_cuda) if is_distributed() else None

    def wait(self) -> Tensor:
        """Wait for the sum."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.value


def all_gather_rows(value: Tensor) -> Tensor:
    """The 1-D `value` of each rank, as rows [ranks, n] on the host; for few numbers. Collective."""
    return AsyncGather(value).wait()


class AsyncGather:
    """The 1-D `value` of each rank, as rows [ranks, n] on the host, under way while other things are done;
    for
    few numbers. Collective.

    With `local` there is one row, this rank's, and nobody is asked: after a failure the others would not
    answer.
    """

    def __init__(self, value: Tensor, local: bool = False) -> None:
        self.rows, self.work, self.copied = value[None], None, None
        if is_distributed() and not local:
            flat = torch.empty(dist.get_world_size() * len(value), dtype=value.dtype, device=value.device)
            self.work = all_gather_single()(flat, value, async_op=not value.is_cuda)
            self.rows = flat.view(-1, len(value))
        if value.is_cuda:
            self.rows = self.rows.to("cpu", non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()
        self.when = time.perf_counter()
        """when the value was known; where a GPU had yet to compute it, that is corrected in `wait`"""

    def wait(self) -> Tensor:
        """Wait for the rows."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if self.copied is not None:
            if not self.copied.query():
                self.copied.synchronize()
                self.when = time.perf_counter()
            self.copied = None
        return self.rows


def broadcast_object(value: Any) -> Any:
    """Rank zero's `value` on every rank; for small things at the start of a run. Collective."""
    objects = [value]
    if is_distributed():
        dist.broadcast_object_list(objects, src=0)
    return objects[0]


def first_error(message: str, group: ProcessGroup | None = None) -> str:
    """The error message of the first rank that has one, on every rank; empty if none has. Collective over
    `group`. At most MESSAGE_BYTES travel.
    """
    if not is_distributed():
        return message
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = torch.tensor(rank if message else world_size)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    if first == world_size:
        return ""
    buffer = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    if rank == first:
        encoded = message.encode()[:MESSAGE_BYTES]
        buffer[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    dist.broadcast(buffer, int(first), group=group)
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if is_distributed():
        dist.barrier()
