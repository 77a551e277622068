"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

# one thread in this process and in all that it starts, before torch is imported: several would wait for each
# other
os.environ["OMP_NUM_THREADS"] = "1"
# else each command that is started compiles all of our modules anew: a tenth of its time
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from tests.ranks import shut_down


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    shut_down()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On several processes, the files with the most slow tests first: none is left for one process in the
    end.
    """
    if os.environ.get("PYTEST_XDIST_WORKER"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n 2`, a file stays with one process, and so does all of tests/slurm: what they share is
    made once.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # it would begin with what has the most tests: the quick ones

    class ByFile(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFile(config, log)
