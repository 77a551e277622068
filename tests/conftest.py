"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# one thread in this process and in all that it starts, before torch is imported: several would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.ranks import shut_down


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    shut_down()
