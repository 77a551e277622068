"""Train a recipe.

    rankzero train recipe=resnet
    rankzero train recipe=./mine.py debug=true
    rankzero train nproc=2 recipe=gpt strategy=fsdp precision=bf16 steps=500
    torchrun --nproc_per_node=2 launch/run.py recipe=gpt optim.lr=1e-3

`strategy=single|ddp|fsdp|zero1|zero2|zero3` decides how the model is spread over the ranks; the numbers stay
the same. A run is kept in run_dir (default runs/RECIPE/TIME-MARK); the same command with the same run_dir
continues it. torchrun, srun and `accelerate launch` start launch/run.py, which is this command on each rank.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated

from annotated_types import Ge

from launch.cli.command import Arguments, read_command, report_mistakes
from launch.cli.exits import MEANINGS
from launch.runtime.agent import check_topology, die_with_agent, run_agent
from launch.runtime.exit_codes import ExitCode
from launch.runtime.process_exit import exit_normally
from launch.runtime.world import World
from launch.training.run_dir import find_run_dir


@dataclass(kw_only=True)
class TrainOptions:
    """What `rankzero train` takes besides the keys of a run."""

    nproc: Annotated[int, Ge(1)] | None = None
    """ranks to start on this machine, by torchrun's elastic agent (default: this process is the only rank)"""
    nnodes: Annotated[int, Ge(1)] = 1
    """with nproc: machines that train together; each starts the same command with its own node_rank"""
    node_rank: Annotated[int, Ge(0)] = 0
    """with nnodes: which of the machines this is, from 0"""
    rendezvous: str | None = None
    """with nnodes: HOST:PORT, an address of machine 0 and a port that is free there"""
    max_restarts: Annotated[int, Ge(0)] = 0
    """with nproc: how often ranks that failed are started again, from the newest checkpoint"""

    check: bool = False
    """go through the command and end (also --check): the ranks are those of RANK, WORLD_SIZE and
    LOCAL_WORLD_SIZE in the environment
    """


def main(argv: list[str]) -> int:
    """Train what `argv` asks for. A rank ends its process; the agent of ranks returns their exit code."""
    die_with_agent(os.environ)
    is_rank = not any(argument.removeprefix("--").startswith("nproc=") for argument in argv)
    arguments = read_command(
        argv, __doc__, TrainOptions, name="train", takes_run=True, on_ranks=is_rank, exits=MEANINGS
    )
    if arguments.options.nproc is not None:
        return start_ranks(arguments, arguments.options.nproc)
    with report_mistakes(arguments.world.rank):
        settings = arguments.settings()
        run_dir = find_run_dir(settings)
    if arguments.options.check:
        return ExitCode.DONE
    # imports torch: what can be refused has been refused
    code = load_trainer().run(settings, arguments.world, run_dir)
    return exit_normally(code)


def start_ranks(arguments: Arguments[TrainOptions], nproc: int) -> int:
    """Start the ranks of this machine, once the run has been checked for them; returns their exit code."""
    options = arguments.options
    with report_mistakes():
        check_topology(nproc, options.nnodes, options.node_rank, options.rendezvous)
        # the others would report the same; their ranks check what differs on a node
        if options.node_rank == 0:
            check_for_ranks(arguments, nproc)
    if options.check:
        return ExitCode.DONE
    return run_agent(
        arguments.run_argv,
        nproc=nproc,
        nnodes=options.nnodes,
        node_rank=options.node_rank,
        rendezvous=options.rendezvous,
        max_restarts=options.max_restarts,
    )


def check_for_ranks(arguments: Arguments[TrainOptions], nproc: int) -> None:
    """Check the run for the ranks that there will be. Raises ValueError or FileNotFoundError."""
    world = World(world_size=arguments.options.nnodes * nproc, local_world_size=nproc, launcher="torchrun")
    settings = arguments.settings(world=world)
    if settings.config.launcher not in ("auto", "torchrun"):
        raise ValueError(f"nproc={nproc} starts torchrun's agent, not launcher={settings.config.launcher}")
    find_run_dir(settings)


def load_trainer() -> ModuleType:
    """`launch.training.trainer`, and torch with it. Imports make no garbage, and looking for it meanwhile
    takes a tenth of their time.
    """
    gc.disable()
    from launch.training import trainer

    gc.enable()
    return trainer
