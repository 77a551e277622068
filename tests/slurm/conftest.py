"""The SLURM that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.stub_home import make_stub_home
from tests.slurm.cluster import Cluster, missing, running

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them are slow."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with running() as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The SLURM with nothing queued; a test may leave jobs behind."""
    yield slurm
    slurm.clear()


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for RANKZERO_HOME, whose launch/run.py is a stub: what SLURM does shows sooner than with a
    training.
    """
    return make_stub_home(tmp_path_factory.mktemp("stub") / "home")
