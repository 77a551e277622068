"""How a run fails: the rank that failed first says so once, in full; the others, who merely lost it, keep silent."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from launch.nonfinite import NonFinite

LOST_PEER_WAIT = 5.0
"""seconds that a rank which only lost a connection leaves to the rank that caused it"""


def report(error: BaseException, run_dir: Path | None, rank: int, step: int | None) -> None:
    """Tell what failed, once for all ranks.

    A rank whose error is a broken connection waits first: the launcher ends it while the cause is being told. The report is
    made once for a run directory, by the first to create failure.json; before there is one, rank zero goes first.
    """
    if lost_peer(error) or (run_dir is None and rank > 0):
        time.sleep(LOST_PEER_WAIT)
    if run_dir is None or claim(run_dir, error, rank, step):
        where = f"rank {rank} on {socket.gethostname()}" + (f", step {step}" if step is not None else "")
        # a NonFinite is a verdict in words, the same on all ranks; anything else needs the line it came from
        trace = "" if isinstance(error, NonFinite) else "".join(traceback.format_exception(error))
        print(f"rankzero: {where}: {type(error).__name__}: {error}\n{trace}", end="\n", file=sys.stderr, flush=True)


def leave() -> NoReturn:
    """End this process with exit code 1, without waiting for any other rank."""
    sys.stdout.flush()
    os._exit(1)  # a clean exit would wait for collectives that can never end


def lost_peer(error: BaseException) -> bool:
    """Whether the error says only that another rank is gone."""
    import torch.distributed as dist

    words = str(error)
    return isinstance(error, dist.DistNetworkError | dist.DistBackendError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "Connection closed by peer" in words)
    )


def claim(run_dir: Path, error: BaseException, rank: int, step: int | None) -> bool:
    """Write failure.json if no rank has; whether this rank did."""
    verdict = {
        "rank": rank,
        "host": socket.gethostname(),
        "step": step,
        "error": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exception(error),
        "time": round(time.time(), 3),
    }
    try:
        with (run_dir / "failure.json").open("x") as file:
            json.dump(verdict, file, indent=1)
    except FileExistsError:
        return False
    except OSError:  # no disk to write to must not hide the error itself
        return True
    return True
