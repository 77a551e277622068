"""Files that a check writes to try a directory, and that must be removed however the check ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_temporary: set[Path] = set()
"""of the whole process: the thread that wrote them may hang while a signal ends the process"""


@contextlib.contextmanager
def removed_afterwards(*paths: Path) -> Iterator[None]:
    """Remove `paths` at the end of the block, or by `remove_all` before."""
    _temporary.update(paths)
    try:
        yield
    finally:
        for path in paths:
            remove(path)
        _temporary.difference_update(paths)


def remove_all() -> None:
    """Remove the files of all open blocks; for a signal handler."""
    for path in list(_temporary):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file; one that is not there, or may not be removed, is left."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
