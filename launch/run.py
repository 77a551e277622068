"""Train a recipe.

    torchrun --nproc_per_node=2 launch/run.py recipe=resnet
    torchrun --nproc_per_node=2 launch/run.py recipe=gpt strategy=fsdp precision=bf16 optim.lr=1e-3 steps=500
    python launch/run.py recipe=./mine.py debug=true

`strategy=single|ddp|fsdp|zero1|zero2|zero3` decides how the model is spread over the ranks; the numbers stay the same.
A run is kept in run_dir (default runs/RECIPE/TIME); the same command with the same run_dir continues it.
Exit codes: 0 done; 1 failed; 2 a mistake in the command, told in one line; 75 stopped on purpose, run it again to continue.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a user's own `data.py` or `config.py` must not find ours
try:
    from launch.command import resolve
except ModuleNotFoundError as missing:
    sys.exit(f"rankzero is not installed here ({missing}): pip install -e .")

from launch import help
from launch.config import stop_for
from launch.run_dir import find_run_dir
from launch.world import World, find_world


def main(words: list[str]) -> None:
    """Train what `words` say; the exit code tells how it ended."""
    world = World()
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return
        world = find_world(os.environ)
        settings = resolve(words, world)
        run_dir = find_run_dir(settings)
    except (ValueError, FileNotFoundError) as error:
        stop_for(error, world.rank)
    # torch is imported from here on: what can be refused has been refused
    from launch.session import run

    run(settings, world, run_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
