"""Run a plain function on N CPU ranks: real processes, a real gloo group, one pool of workers for the whole
session.

    def total(world: World, value: int) -> float:
        tensor = torch.tensor(float(value * world.rank))
        torch.distributed.all_reduce(tensor)
        return tensor.item()

    def test_total() -> None:
        assert run_ranks(2, total, 10) == [10.0, 10.0]

Importing torch and what we use with it costs seconds, a task costs milliseconds: so it is imported once, by a
process that the workers are forked from; the workers stay, and each task gets a fresh process group. Nothing
here imports torch: the pool must cost nothing to the tests that do not use it.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

MAX_RANKS = 4
TASK_TIMEOUT_S = 600.0
"""until a task counts as hanging: on an idle machine the longest takes a minute"""
FAILURE_GRACE_S = 30.0
"""seconds that the other ranks get after a first failure: they may be stuck in a collective with the failed
one
"""
PRELOADED_MODULES = (
    *(
        "torch",
        "torch.distributed.fsdp",
        "torch._dynamo.testing",
        "functorch.compile",
        "torchvision",
        "torchmetrics",
    ),
    *(
        "deepspeed.runtime.engine",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.original_muon",
    ),
)
"""what is there when a worker starts, if it is installed, DeepSpeed's late imports too; none of it starts a
thread
"""
SINGLE_THREAD_ENV = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1"
)
"""before torch is imported; the third one: else inductor starts a pool of processes that outlives the test"""


@dataclass(frozen=True)
class CpuWorld:
    """What a function under test is told about its place (`strategies.base.World`)."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: str = "cpu"


class RanksFailed(AssertionError):
    """One or more ranks raised, died or hung; `errors` maps the rank to what happened, the cause before its
    consequences.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        (rank, first), *others = errors.items()
        last_lines = [f"rank {other}: {text.strip().splitlines()[-1]}" for other, text in others]
        super().__init__("\n".join([f"rank {rank} failed first:", first.rstrip(), *last_lines]))


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TASK_TIMEOUT_S
) -> list[Any]:
    """The results of `function(world, *args)` on ranks 0 to `world_size` - 1, by value.

    `function` is a module-level function; arguments and results must pickle. Raises RanksFailed.
    """
    assert 1 <= world_size <= MAX_RANKS, f"the pool has {MAX_RANKS} ranks, not {world_size}"
    return _pool().run(world_size, function, args, timeout)


def shut_down() -> None:
    """End the workers and the process that they come from, if any were started."""
    if _pools:
        _pools.pop().close()


_pools: list[Pool] = []


def _ready_to_fork() -> ForkServerContext:
    """The context whose processes are forked from one that has imported IMPORTED."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    before = {name: os.environ.get(name) for name in SINGLE_THREAD_ENV}
    os.environ.update(SINGLE_THREAD_ENV)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _pool() -> Pool:
    if not _pools:
        _pools.append(Pool())
    return _pools[0]


class Worker:
    """One process of the pool."""

    def __init__(self) -> None:
        context = _ready_to_fork()
        self.connection, theirs = context.Pipe()
        # not daemonic: a function under test may start processes of its own (the workers of a DataLoader)
        self.process = context.Process(target=_work, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def end(self, patience: float) -> int | None:
        """Wait for the end of an idle worker, which returns when its pipe closes; kill any other. Returns its
        exit code.
        """
        self.connection.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        return code


class Pool:
    """Workers by rank, started when first needed. One that died or hangs is ended, and replaced by the next
    call.
    """

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        # without it a script that forgot to shut down would wait at its exit for workers that wait for it
        atexit.register(shut_down)

    def run(
        self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        started = [
            self.workers.setdefault(rank, Worker()) for rank in range(world_size) if rank not in self.workers
        ]
        for worker in started:  # together; and what a busy machine takes for that must not count as a hang
            assert worker.connection.poll(TASK_TIMEOUT_S), "a worker does not start"
            worker.connection.recv()
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            # pickled twice: the worker takes over sys.path before it imports the module of the function
            task = (list(sys.path), str(Path(folder) / "store"), world_size, pickle.dumps((function, args)))
            for rank in range(world_size):
                self.workers[rank].connection.send((rank, *task))
            results, errors = self._collect(world_size, timeout)
        if errors:
            raise RanksFailed(errors)
        return [results[rank] for rank in range(world_size)]

    def _collect(self, world_size: int, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results by rank, and errors by rank in the order in which they happened, by the clock that all
        processes share.

        Not in that of their arrival: on a busy machine a rank that has lost its peer may be heard before the
        peer. One that died tells no time, but the others outlive it: it comes first. One that hangs comes
        last.
        """
        results: dict[int, Any] = {}
        errors: dict[int, tuple[float, str]] = {}
        answer: Any
        waiting = {self.workers[rank].connection: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            since = "the first failure" if errors else f"its start ({timeout:g} s)"
            for connection in ready or list(waiting):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failed_at, answer = connection.recv() if ready else (math.inf, "")
                except (EOFError, ConnectionResetError):
                    failed_at, answer = (
                        -math.inf,
                        f"the process died, exit code {self.workers.pop(rank).end(FAILURE_GRACE_S)}",
                    )
                if not ready:
                    self.workers.pop(rank).end(0.0)
                    answer = f"no answer since {since}: the rank hangs"
                if failed_at is None:
                    results[rank] = pickle.loads(answer)
                else:
                    errors[rank] = failed_at, answer
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
        return results, {
            rank: answer for rank, (_, answer) in sorted(errors.items(), key=lambda error: error[1][0])
        }

    def close(self) -> None:
        atexit.unregister(shut_down)
        for worker in self.workers.values():
            worker.connection.close()  # all at once: none waits for the one before it
        for worker in self.workers.values():
            worker.end(FAILURE_GRACE_S)
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # else it would end with this process only


def _work(connection: Connection) -> None:
    """The life of a worker: tasks until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            rank, path, store, world_size, payload = connection.recv()
        except EOFError:
            os._exit(0)  # exit handlers and threads of libraries (DeepSpeed's) take seconds, or for ever
        sys.path[:] = path
        _forget_deepspeed()
        failed_at: float | None = None
        answer: bytes | str
        try:
            with _process_group(rank, world_size, store):
                try:
                    function, args = pickle.loads(payload)
                    world = CpuWorld(
                        rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size
                    )
                    # plain pickle sends tensors by value; that of torch.multiprocessing would share their
                    # memory
                    answer = pickle.dumps(function(world, *args))
                except BaseException:
                    failed_at = (
                        time.monotonic()
                    )  # before the connections are closed, which the others fail by
                    raise
        except BaseException:
            failed_at, answer = failed_at or time.monotonic(), traceback.format_exc()
        connection.send((failed_at, answer))


@contextmanager
def _process_group(rank: int, world_size: int, store: str) -> Iterator[None]:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        # a function without collectives could end, and close its connections, while another rank is still
        # making them
        distributed.barrier()
        yield
    finally:
        # after a failure too: it closes the connections, so that the others fail at once instead of waiting
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _forget_deepspeed() -> None:
    """ZeRO-3 numbers modules and parameters for the life of a process, and compares between ranks: a worker's
    past shows.
    """
    if offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        # the one counter is a default argument: [count]
        (counter,) = offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
        counter[0] = offload.Init.param_id = 0
