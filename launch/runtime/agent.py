"""`rankzero train nproc=N`: start the ranks of one node under torchrun's elastic agent, in this process.

The ranks are started, watched and restarted by torch's own agent with the environment variables of torchrun;
only what is printed is ours, and the exit code is that of the ranks. No torch at module level.

    agent (this process)  --Popen, a session each-->  rank: python launch/run.py ARGS
      SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2 --forwarded-->  every rank, which stops in good order
      dies, kill -9 included  --PR_SET_PDEATHSIG-->  SIGKILL to every rank
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from launch.runtime.cpus import usable_cpus
from launch.runtime.exit_codes import ExitCode

AGENT_PID = "RANKZERO_AGENT_PID"
"""the environment variable that tells a rank which process must outlive it"""
PR_SET_PDEATHSIG = 1


def run_agent(
    argv: Sequence[str],
    *,
    nproc: int,
    nnodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    max_restarts: int = 0,
) -> int:
    """Start `launch/run.py ARGV` on `nproc` ranks of this node and wait for them; returns their exit code.

    Of several nodes, each calls this with its `node_rank` and the same `rendezvous`, HOST:PORT, which node 0
    serves; one node takes a free port. Failed ranks are restarted up to `max_restarts` times, as by torchrun.
    Must be called in the main thread, whose signal handlers it replaces. Raises ValueError for arguments that
    cannot be.
    """
    endpoint = check_topology(nproc, nnodes, node_rank, rendezvous)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no rank yet: Ctrl-C ends this process, without a traceback
    if node_rank > 0:
        # node 0 may have ended with a mistake: srun, which ends the others, returns the highest code of all
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(ExitCode.FAILED))  # noqa: ARG005
    os.environ[AGENT_PID] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cpus() // nproc, 1)))
    from launch.runtime.elastic_agent import run_ranks

    program = importlib.util.find_spec("launch.run")
    assert program is not None
    assert program.origin is not None
    # the agent would substitute ${local_rank} and $$ in arguments
    command = ["-u", program.origin, *(argument.replace("$", "$$") for argument in argv)]
    try:
        return run_ranks(command, nproc, nnodes, node_rank, endpoint, max_restarts)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def check_topology(nproc: int, nnodes: int, node_rank: int, rendezvous: str | None) -> tuple[str, int] | None:
    """The host and port of `rendezvous`, None without it. Raises ValueError for what cannot be."""
    for name, count in (("nproc", nproc), ("nnodes", nnodes)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"node_rank={node_rank} must be 0 to {nnodes - 1} with nnodes={nnodes}")
    if rendezvous is None:
        if nnodes > 1:
            raise ValueError(
                f"nnodes={nnodes} needs rendezvous=HOST:PORT, an address of node 0 and a free port"
            )
        return None
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"rendezvous={rendezvous} is not HOST:PORT, such as node1:29500")
    return host.strip("[]"), int(port)


def die_with_agent(environment: Mapping[str, str]) -> None:
    """In a rank: let the kernel kill this process when its agent dies, however that happens (Linux).

    Without that, ranks whose agent was killed with SIGKILL would go on, and hold their GPUs.
    """
    agent = environment.get(AGENT_PID, "")
    if agent != str(os.getppid()) or not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if str(os.getppid()) != agent:  # it died meanwhile
        os._exit(ExitCode.FAILED)
