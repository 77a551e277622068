"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# one thread in this process and in all that it starts, before torch is imported: several would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.ranks import shut_down


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    shut_down()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n 2`, a file stays with one process, and so does all of tests/slurm: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFile(config, log)
