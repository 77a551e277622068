"""Check the machines before a run does.

    rankzero doctor                                 this machine
    srun --ntasks-per-node=1 rankzero doctor        all nodes of a SLURM job
    torchrun --nproc_per_node=8 -m launch doctor    the ranks as a run has them

Checks whether all ranks join; host names, network interfaces and the port; whether versions and code are
equal; which GPU each rank gets, and which other processes use it; shared memory, limits, CPUs, disk, one
directory for all nodes, clocks; and measures the bandwidth between neighboring ranks (a ring, not every pair)
against what the link should give. Prints one table, with the fix under each warning and failure. Where nodes
cannot reach each other torchrun itself waits without a word: srun, or RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set by hand on each node, shows why.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from annotated_types import Gt, Lt

from launch.cli.command import read_command, report_mistakes
from launch.diagnostics import check_ranks
from launch.runtime.exit_codes import ExitCode
from launch.runtime.store import rendezvous_endpoint

EXITS = {ExitCode.DONE: "all checks pass, or warn", ExitCode.FAILED: "a check fails"}


@dataclass(kw_only=True)
class DoctorOptions:
    """What `rankzero doctor` takes."""

    run_dir: str = "."
    """the directory to try, such as /scratch/me/runs"""
    timeout: Annotated[float, Gt(0), Lt(3600)] = 20.0
    """seconds to wait for the other ranks"""


def main(argv: list[str]) -> NoReturn:
    """Check; the process ends with the exit code, the same on all ranks that joined."""
    check_ranks.end_on_signals()
    arguments = read_command(argv, __doc__, DoctorOptions, name="doctor", on_ranks=True, exits=EXITS)
    options, world, environment = arguments.options, arguments.world, dict(os.environ)
    with report_mistakes(world.rank):
        endpoint = rendezvous_endpoint(world, environment)
    code = check_ranks.check_ranks(world, environment, endpoint, Path(options.run_dir), options.timeout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that hangs (a dead file server, a collective) must not keep the command
