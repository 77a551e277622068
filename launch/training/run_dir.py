"""The run directory: which one, and what is written into it at the start. No torch."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.cli.keys import to_dict
from launch.cli.resolve import Settings
from launch.runtime.files import write_text_atomically
from launch.runtime.restarts import restart_count
from launch.runtime.world import World
from launch.watchdog.failure_report import FAILURE_FILE, PREVIOUS_FAILURE_FILE, read_failure
from launch.watchdog.stop import STOP_FILE

MAX_REPEATED = 3
"""attempts that may fail in the same way before the run is not started again"""
NOT_KEPT = ("config", "run_dir", "resume")
"""keys that say where and how to start, and would be wrong in the file when it is used as `config=` of
another run
"""


def find_run_dir(settings: Settings) -> Path:
    """The run directory asked for, or a new name. Raises ValueError if it holds a run that this one must not
    touch.
    """
    config = settings.config
    name = Path(config.recipe.partition(":")[0]).stem
    if config.run_dir is None and config.debug:
        return Path("runs/debug") / name
    if config.run_dir is None:
        return default_run_dir(Path("runs") / name, os.environ)
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run_dir={path} is a file; name a folder")
    if (path / "config.yaml").is_file():
        before: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text()) or {}
        if before.get("recipe") != config.recipe:
            raise ValueError(
                f"run_dir={path} belongs to recipe={before.get('recipe')}, not {config.recipe}; choose "
                "another run_dir"
            )
        if config.resume == "none" and not restart_count(os.environ):
            raise ValueError(
                f"run_dir={path} holds a run and resume=none would overwrite it; choose another run_dir"
            )
        refuse_to_loop(path)
    return path


def default_run_dir(folder: Path, environment: Mapping[str, str]) -> Path:
    """`TIME-MARK`, where MARK stands for the process that started the run: two that start in the same second
    do not share a directory.

    Under torchrun that is its agent: a rank that it starts again finds the directory of the attempt before by
    the mark. Raises ValueError where it cannot: after a restart on several nodes, rank zero may be on
    another.
    """
    several = environment.get("LOCAL_WORLD_SIZE") != environment.get("WORLD_SIZE")
    if several and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError(
            "torchrun --max-restarts on several nodes needs run_dir=: else a restarted run begins anew"
        )
    # .../torchelastic_abc/none_xyz/attempt_0/0/error.json: the agent draws abc and xyz once for all attempts
    agent = environment.get("TORCHELASTIC_ERROR_FILE", "").partition("/attempt_")[0]
    process = f"{socket.gethostname()} {agent or os.getpid()}"
    mark = hashlib.blake2b(process.encode(), digest_size=2).hexdigest()
    earlier_attempts = sorted(folder.glob(f"*-{mark}")) if agent else []
    if earlier_attempts:
        return earlier_attempts[-1]
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{mark}"


def refuse_to_loop(path: Path) -> None:
    """Raise ValueError if the last attempts of the run failed in the same way at the same step: another one
    would too.
    """
    failure = read_failure(path / FAILURE_FILE)
    if failure is not None and (failure.repeated or 1) >= MAX_REPEATED:
        raise ValueError(
            f"the last {failure.repeated} attempts of run_dir={path} all failed at step {failure.step} with "
            f"{failure.error}: {failure.message}; mend that, then remove {path / FAILURE_FILE}"
        )


def start_run_dir(path: Path, settings: Settings, world: World) -> None:
    """Write config.yaml: every key as resolved, then what the run was made with. Called on rank zero."""
    from launch.runtime.versions import git_revision, versions  # a fifth of the time that `--help` may take

    path.mkdir(parents=True, exist_ok=True)
    (path / STOP_FILE).unlink(missing_ok=True)
    if (path / FAILURE_FILE).exists():  # kept, to see whether the next one is the same
        (path / FAILURE_FILE).replace(path / PREVIOUS_FAILURE_FILE)
    keys = {name: value for name, value in to_dict(settings.config).items() if name not in NOT_KEPT}
    made_with = {
        "versions": versions(),
        "git": git_revision(),
        "launcher": world.launcher,
        "world_size": world.world_size,
        "local_world_size": world.local_world_size,
        "device": world.device,
    }
    text = yaml.safe_dump({**keys, **to_dict(settings.recipe), "made_with": made_with}, sort_keys=False)
    write_text_atomically(path / "config.yaml", text)
