"""What ranks find out together: sums, rows of each rank's numbers, the first problem of any. A process by
itself need not ask.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place."""
    return AsyncSum(value).get()


class AsyncSum:
    """The sum of `value` over all ranks, in place, on its way while other things are done.

    On a GPU nobody waits for it anyway, and NCCL does not like several groups to be at work at once.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.work = dist.all_reduce(value, async_op=not value.is_cuda) if is_distributed() else None

    def get(self) -> Tensor:
        """Wait for it."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.value


def all_gather_rows(value: Tensor) -> Tensor:
    """The 1-D `value` of each rank, as rows on the host; for few numbers."""
    return AsyncGather(value).get()


class AsyncGather:
    """The 1-D `value` of each rank, as rows on the host, on its way while other things are done; for few
    numbers.
    """

    def __init__(self, value: Tensor, local: bool = False) -> None:
        """With `local`, the row of this rank alone, without asking the others: after a failure they would not
        answer.
        """
        self.rows, self.work, self.copied = value[None], None, None
        if is_distributed() and not local:
            gather = (
                getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            )  # renamed in torch 2.14
            flat = torch.empty(dist.get_world_size() * len(value), dtype=value.dtype, device=value.device)
            self.work = gather(flat, value, async_op=not value.is_cuda)
            self.rows = flat.view(-1, len(value))
        if value.is_cuda:
            self.rows = self.rows.to("cpu", non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()
        self.when = time.perf_counter()
        """when the value was known; where a GPU had yet to compute it, that is corrected in `get`"""

    def get(self) -> Tensor:
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
    """Rank zero's `value` on every rank; for small things at the start of a run."""
    box = [value]
    if is_distributed():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def first_error(problem: str, group: ProcessGroup | None = None) -> str:
    """The words of the first rank that has a problem, on every rank; empty if none has any. At most 1,000
    bytes.
    """
    if not is_distributed():
        return problem
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = torch.tensor(rank if problem else world_size)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    if first == world_size:
        return ""
    words = torch.zeros(1000, dtype=torch.uint8)
    if rank == first:
        said = problem.encode()[: len(words)]
        words[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    dist.broadcast(words, int(first), group=group)
    return bytes(words.tolist()).rstrip(b"\0").decode(errors="replace")


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()
