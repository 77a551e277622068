"""torchrun's elastic agent with our own reports: forwards signals to the ranks, waits for a save in progress.

`LocalElasticAgent` is meant to be extended; overridden are methods that its documentation lists.
https://docs.pytorch.org/docs/stable/elastic/agent.html
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.runtime.exit_codes import ExitCode
from launch.runtime.rank_exits import ON_PURPOSE, exit_code_of, unexplained
from launch.runtime.store import UnreachableError, check_own_endpoint, wait_until_open

FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip
RENDEZVOUS_TIMEOUT = 300
"""seconds for the agents of all nodes to come together; those of a job start within a minute, as a rule"""


class RanksEnded(Exception):
    """The ranks of this node have ended for good: no restart could help, or none is wanted."""


class RankAgent(LocalElasticAgent):
    """torchrun's agent for the ranks of one node.

    Unlike torchrun's, it survives the signals that it forwards, prints no log of its own, lets ranks that
    stop on purpose finish their save before the first to end takes the others down, and never restarts those.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, nnodes: int) -> None:
        super().__init__(spec, logs_specs)
        self.nnodes = nnodes
        self.pending: list[int] = []
        """signals to forward to the ranks"""
        self.forwarded: set[int] = set()
        self.ended: dict[int, int] = {}
        """exit code by rank, of those that ended by themselves before the others were terminated"""

    def note_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal handler: forwarded is from the loop that watches the ranks, within a tenth of a second."""
        self.pending.append(number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.ended = {}
        pids: dict[int, Any] = super()._start_workers(worker_group)
        for number in FORWARDED:  # torch's own handlers, just installed, would end the agent
            signal.signal(number, self.note_signal)
        return pids

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self.report()
        if worker_group.workers[0].global_rank == 0:
            print_line("starting the ranks again, from the newest checkpoint")
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        pids = {worker.global_rank: int(worker.id) for worker in worker_group.workers}
        self.forward(pids.values())
        running = [rank for rank in pids if rank not in self.ended]
        now = {rank: code for rank in running if (code := peek_exit_code(pids[rank])) is not None}
        self.ended |= now
        codes = set(self.ended.values())
        stopped = ExitCode.STOPPED in codes
        saving = stopped and codes <= {ExitCode.DONE, ExitCode.STOPPED} and len(self.ended) < len(pids)
        if saving or not now:  # torch would terminate ranks that still write their part of a checkpoint
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        if not any(self.ended.values()):  # a rank that failed since the look at them
            failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self.ended |= {rank: code for rank, code in failures.items() if code != -signal.SIGTERM}
        if result.state == WorkerState.FAILED and (self.forwarded or {*self.ended.values()} & {*ON_PURPOSE}):
            if stopped and self.nnodes > 1:
                # the store must outlive the ranks of the other nodes
                self._exit_barrier()  # type: ignore[no-untyped-call]  # torch has no types here
            raise RanksEnded
        return result

    def forward(self, pids: Iterable[int]) -> None:
        """Send the signals that came since the last call to all ranks."""
        while self.pending:
            number = self.pending.pop(0)
            self.forwarded.add(number)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)  # each rank leads a session of its own

    def report(self) -> None:
        """Print a line for each rank that ended without a word."""
        for line in unexplained(self.ended, socket.gethostname(), self.forwarded):
            print_line(line)


def run_ranks(
    command: Sequence[str],
    nproc: int,
    nnodes: int,
    node_rank: int,
    endpoint: tuple[str, int] | None,
    max_restarts: int,
) -> int:
    """Run the Python `command` on the ranks of this node under an agent; returns their exit code.

    Collective over the agents of all nodes: none starts its ranks before all have come.
    """
    silence_torchrun()
    with tempfile.TemporaryDirectory(prefix="rankzero-agent-", ignore_cleanup_errors=True) as folder:
        try:
            handler = get_rendezvous_handler(rendezvous_parameters(nnodes, node_rank, endpoint))
            spec = WorkerSpec(
                role="default_role",
                local_world_size=nproc,
                entrypoint=sys.executable,
                args=tuple(command),
                rdzv_handler=handler,
                max_restarts=max_restarts,
                master_addr=endpoint[0] if endpoint else None,
                master_port=endpoint[1] if endpoint else None,
            )
            agent = RankAgent(spec, DefaultLogsSpecs(log_dir=folder), nnodes)
            return supervise(agent)
        except (UnreachableError, DistError) as error:
            print_line(
                f"node {node_rank} ({socket.gethostname()}) did not meet the others: {one_line(error)}"
            )
            return ExitCode.FAILED


def supervise(agent: RankAgent) -> int:
    """Run `agent` to its end; returns the exit code of its ranks."""
    try:
        agent.run()
    except RanksEnded:
        pass  # no error: how RankAgent leaves torch's loop; `agent.ended` holds the exit codes
    except SignalException as error:  # between the start of the ranks and our own handlers
        return 128 + int(error.sigval)
    finally:
        for number in FORWARDED:  # Python's shutdown would let them change the exit code
            signal.signal(number, signal.SIG_IGN)
    agent.report()
    return exit_code_of(agent.ended.values(), agent.forwarded)


def rendezvous_parameters(
    nnodes: int, node_rank: int, endpoint: tuple[str, int] | None
) -> RendezvousParameters:
    """Where the agents meet: at `endpoint`, or for one node on a free port, as `torchrun --standalone` does.

    Raises UnreachableError, with the reason, if node 0 cannot serve the endpoint or another cannot reach it.
    """
    if endpoint is None:
        return RendezvousParameters("c10d", "localhost:0", str(uuid.uuid4()), nnodes, nnodes)
    host, port = endpoint
    if node_rank == 0:
        check_own_endpoint(host, port)
    else:
        wait_until_open(host, port, RENDEZVOUS_TIMEOUT)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch waits for the other agents outside Python
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return RendezvousParameters(
        "static", address, "rankzero", nnodes, nnodes, rank=node_rank, timeout=RENDEZVOUS_TIMEOUT
    )


def silence_torchrun() -> None:
    """Keep the agent's own log lines off the screen: what matters of them is reported in words of ours."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def peek_exit_code(pid: int) -> int | None:
    """The exit code of a child, negative for a signal; None while it runs. Its Popen still waits for it."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # its Popen has waited for it
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def print_line(message: str) -> None:
    """One line on stderr."""
    print(f"rankzero: {message}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The first sentence of an error of torch's store, without the C++ frames below it."""
    return " ".join(str(error).partition("\n")[0].split())
