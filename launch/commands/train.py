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
from typing import NoReturn

from launch.cli.command import read_command, report_mistakes
from launch.cli.exits import MEANINGS, ExitCode
from launch.runtime.agent import die_with_agent
from launch.runtime.process_exit import exit_normally
from launch.training.run_dir import find_run_dir


@dataclass(kw_only=True)
class TrainOptions:
    """What `rankzero train` takes besides the keys of a run."""

    check: bool = False
    """go through the command and end (also --check): the ranks are those of RANK, WORLD_SIZE and
    LOCAL_WORLD_SIZE in the environment
    """


def main(argv: list[str]) -> NoReturn:
    """Train what `argv` asks for; the process ends with the exit code."""
    die_with_agent(os.environ)
    arguments = read_command(
        argv, __doc__, TrainOptions, name="train", takes_run=True, on_ranks=True, exits=MEANINGS
    )
    with report_mistakes(arguments.world.rank):
        settings = arguments.settings()
        run_dir = find_run_dir(settings)
    if arguments.options.check:
        raise SystemExit(ExitCode.DONE)
    # imports torch: what can be refused has been refused
    exit_normally(load_trainer().run(settings, arguments.world, run_dir))


def load_trainer() -> ModuleType:
    """`launch.training.trainer`, and torch with it. Imports make no garbage, and looking for it meanwhile
    takes a tenth of their time.
    """
    gc.disable()
    from launch.training import trainer

    gc.enable()
    return trainer
