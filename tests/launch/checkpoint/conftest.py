"""A run with checkpoints, for all tests of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.checkpoint import directory
from tests.launch.checkpoints import FIT_KEYS
from tests.launch.runs import make_run, train_run
from tests.ranks import CpuWorld, run_ranks


def train_fit(world: CpuWorld, folder: Path) -> None:
    train_run(make_run(world, "Fit", *FIT_KEYS), folder)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, with checkpoints of steps 4 and 6. Its tests work on copies."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, train_fit, folder)
    assert [directory.step_of(path) for path in directory.list_checkpoints(folder)] == [4, 6]
    return folder
