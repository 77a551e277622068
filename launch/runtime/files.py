"""Atomic files, complete or absent even if the machine dies while they are written; and their digests. No
torch.

What a checkpoint does to the content of its files goes through here; the rest is `mkdir`, `rename` and the
listing of a path. So another kind of storage (fsspec) would enter in this file.

The hash is XXH3 with 128 bits. It finds accidents: what is torn, flipped, swapped or mixed up. It is no seal
against forgery, but whoever can write a file can write its digest as well. SHA-256 costs 15 times as much (27
against 1.8 GB/s on one core that has instructions for it), which is more than the copies of a save together.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_128

CHUNK = 8 * 2**20
"""bytes that are written, read or hashed at a time"""
MAX_READ = 2**30
"""bytes of one system call; the kernel reads at most twice as many"""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, force it to disk, then rename it to `path`."""
    beside = path.with_name(f".{path.name}.partial")
    write(beside)
    sync(beside)
    beside.rename(path)
    sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda beside: beside.write_text(text))


OnProgress = Callable[[int], object]
"""called with each number of bytes read or written"""


def write_hashed(
    path: Path, parts: Iterable[bytes | memoryview], on_progress: OnProgress = lambda _: None
) -> str:
    """Write `parts` one after the other and force them to disk; returns the digest of the file.

    The file is hashed as it is written, chunk by chunk: the bytes are still in the processor's cache.
    """
    hash = xxh3_128()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                hash.update(chunk)
                on_progress(len(chunk))
                while chunk:  # a write may be short, close to a full disk
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return hash.hexdigest()


def digest_of(path: Path, on_progress: OnProgress = lambda _: None) -> str:
    """The digest of a file, read once."""
    hash, buffer = xxh3_128(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            hash.update(buffer[:read])
            on_progress(read)
    return hash.hexdigest()


def digest(content: bytes | memoryview) -> str:
    """The digest of `content`."""
    return xxh3_128(content).hexdigest()


class RandomAccessFile:
    """An open file, read from any place. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.handle).st_size

    def into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on. Raises ValueError if the file ends before."""
        while view:
            count = os.preadv(self.handle, [view[:MAX_READ]], offset)
            if not count:
                raise ValueError(f"it ends {len(view)} bytes too early")
            view, offset = view[count:], offset + count

    def hold(self) -> None:
        """Keep others from removing the folder of the file (`remove_unless_held`) until it is closed."""
        with suppress(OSError):  # a file system without locks: then without
            fcntl.flock(self.handle, fcntl.LOCK_SH)

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def remove_unless_held(folder: Path, file: str) -> bool:
    """Remove `folder`, unless a process on this machine (or on another, where the file system can tell) holds
    `file` in it. Returns whether it was removed: another process may also have been faster.
    """
    try:
        reading = RandomAccessFile(folder / file)
    except FileNotFoundError:
        return False
    try:
        with suppress(OSError):
            try:
                fcntl.flock(reading.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        remove_folder(folder)  # with the lock: who waits for it finds nothing any more
    except FileNotFoundError:
        return False
    finally:
        reading.close()
    return True


def check_free_space(folder: Path, size: int) -> None:
    """Raises OSError, with both sizes in its message, if `size` bytes do not fit into `folder`."""
    from rich.filesize import decimal

    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"{decimal(size)} are to be written, {decimal(free)} are free", str(folder)
        )


def remove_folder(path: Path) -> None:
    """Remove a folder so that no part of it is ever taken for all of it: it loses its name first."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
