"""Files that a check writes to try a folder, and that must not outlive it, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_written: set[Path] = set()
"""of the whole process: the thread that wrote them may hang while a signal ends the others"""


@contextlib.contextmanager
def scratch(*paths: Path) -> Iterator[None]:
    """Remove `paths` at the end of the block, or by `remove_all` before."""
    _written.update(paths)
    try:
        yield
    finally:
        for path in paths:
            remove(path)
        _written.difference_update(paths)


def remove_all() -> None:
    """Remove what is left of all blocks; for a signal."""
    for path in list(_written):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file that may not be there, or not be ours to remove."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
