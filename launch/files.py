"""Files that are whole or absent, even if the machine dies while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, force it to disk, then rename it to `path`."""
    beside = path.with_name(f".{path.name}.partial")
    write(beside)
    sync(beside)
    beside.rename(path)
    sync(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda beside: beside.write_text(text))


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
