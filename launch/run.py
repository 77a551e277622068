"""Train a recipe.

    torchrun --nproc_per_node=2 launch/run.py recipe=resnet
    torchrun --nproc_per_node=2 launch/run.py recipe=gpt strategy=fsdp precision=bf16 optim.lr=1e-3 steps=500
    python launch/run.py recipe=./mine.py debug=true

`strategy=single|ddp|fsdp|zero1|zero2|zero3` decides how the model is spread over the ranks; the numbers stay
the same. A run is kept in run_dir (default runs/RECIPE/TIME-MARK); the same command with the same run_dir
continues it.
`--check` goes through the command and ends; the ranks are those of RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in
the environment. Exit codes: 0 done; 1 failed; 2 a mistake in the command, told in one line; 75 stopped on
purpose, run it again to continue.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from types import ModuleType

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a user's own `data.py` or `config.py` must not find ours
try:
    from launch.cli.resolve import resolve
except ModuleNotFoundError as missing:
    sys.exit(f"rankzero is not installed here ({missing}): pip install -e .")

from launch.cli import help
from launch.cli.config import exit_with_mistake
from launch.runtime.agent import die_with_agent
from launch.runtime.process_exit import exit_normally
from launch.runtime.world import World, find_world
from launch.training.run_dir import find_run_dir


def main(words: list[str]) -> None:
    """Train what `words` say; the exit code tells how it ended."""
    die_with_agent(os.environ)
    world = World()
    try:
        check_only, words = "--check" in words, [word for word in words if word != "--check"]
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return
        # which rank this is must be known before the first mistake: one rank tells it
        launcher = next(
            (word.removeprefix("launcher=") for word in words if word.startswith("launcher=")), "auto"
        )
        world = find_world(os.environ, launcher)
        settings = resolve(words, world)
        run_dir = find_run_dir(settings)
        if check_only:
            return
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, world.rank)
    # imports torch: what can be refused has been refused
    exit_normally(load_trainer().run(settings, world, run_dir))


def load_trainer() -> ModuleType:
    """`launch.training.trainer`, and torch with it. Imports make no garbage, and looking for it meanwhile
    takes a tenth of their time.
    """
    gc.disable()
    from launch.training import trainer

    gc.enable()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
