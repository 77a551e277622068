"""The run directory: which one, and what is written into it at the start. No torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from launch.command import Settings
from launch.config import nested
from launch.files import write_text_whole
from launch.world import World

NOT_KEPT = ("config", "run_dir", "resume")
"""keys that say where and how to start, and would be wrong in the file when it is used as `config=` of another run"""


def find_run_dir(settings: Settings) -> Path:
    """The run directory asked for, or a new name. Raises ValueError if it holds a run that this one must not touch."""
    config = settings.config
    name = Path(config.recipe.partition(":")[0]).stem
    if config.run_dir is None:
        return Path("runs/debug") / name if config.debug else Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir={path} is a file; name a folder")
    if (path / "config.yaml").is_file():
        before: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text()) or {}
        if before.get("recipe") != config.recipe:
            raise ValueError(
                f"run_dir={path} belongs to recipe={before.get('recipe')}, not {config.recipe}; choose another run_dir"
            )
        if config.resume == "none":
            raise ValueError(f"run_dir={path} holds a run and resume=none would overwrite it; choose another run_dir")
    return path


def start_run_dir(path: Path, settings: Settings, world: World) -> None:
    """Write config.yaml: every key as resolved, then what the run was made with. Called on rank zero."""
    from launch.versions import git_revision, versions  # a fifth of the time that `--help` may take

    path.mkdir(parents=True, exist_ok=True)
    (path / "failure.json").unlink(missing_ok=True)  # of a former life
    keys = {name: value for name, value in nested(settings.config).items() if name not in NOT_KEPT}
    made_with = {
        "versions": versions(),
        "git": git_revision(),
        "launcher": world.launcher,
        "world_size": world.world_size,
        "local_world_size": world.local_world_size,
        "device": world.device,
    }
    text = yaml.safe_dump({**keys, **nested(settings.recipe), "made_with": made_with}, sort_keys=False)
    write_text_whole(path / "config.yaml", text)
