"""Asynchronous, atomic saves: the training waits for a copy into host memory, a thread writes the file.

Each rank has such a thread; that of rank zero commits the checkpoint.

    training thread, all ranks          background thread, all ranks
    save()  wait for the save before
            copy into the snapshot  ->  write rank-NNNNN.safetensors and its part of the manifest
            (next steps)                have all ranks succeeded? (collective, in a group of its own)
                                        rank zero: write the manifest, rename the folder, prune
    poll() or wait()                <-  SaveResult

One save is in flight at a time. A second waits for the first to be committed: every checkpoint that was asked
for exists, on all ranks alike, and no second buffer is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launch.checkpoint.directory import (
    checkpoint_dir,
    checkpoints_dir,
    partial_dir,
    prune,
    remove_partial,
)
from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.checkpoint.saved_state import manifest_of, slices_of
from launch.checkpoint.snapshot import Snapshot, specs_of
from launch.runtime.collectives import first_error
from launch.runtime.files import check_free_space, remove_folder, sync, write_hashed, write_text_atomically

if TYPE_CHECKING:
    from launch.state.run import Run

GRACE_AFTER_FAILURE_S = 5.0
"""seconds that a run which has failed leaves to the save in flight"""
GROUP_TIMEOUT = timedelta(hours=2)
"""for the slowest rank's file: far beyond any write, short of for ever"""
NICENESS = 10
"""of the writing thread: where all cores are busy, the training goes first"""


class SaveError(Exception):
    """The last checkpoint of a run could not be written; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save went. The same on all ranks, but for the times and the size, which are this rank's own."""

    step: int
    blocking_s: float
    """seconds that the training waited: for the save before, and for the copy"""
    write_s: float
    """seconds in the background, from the copy to the commit"""
    size: int
    """bytes that this rank wrote"""
    error: str
    """why there is no checkpoint of this step; empty if there is one"""


class CheckpointWriter:
    """Saves a run into its directory. Each rank has one, and calls it at the same steps as the others."""

    def __init__(self, run: Run, run_dir: Path, versions: Mapping[str, str]) -> None:
        """Collective: all ranks make one at the same time."""
        self.run, self.run_dir, self.versions = run, run_dir, versions
        self.world, self.options = run.world, run.config.checkpoint
        if self.world.rank == 0:
            checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
            remove_partial(run_dir)
        # a group of its own: in one that two threads shared, the order of their collectives would be left to
        # chance
        distributed = self.world.world_size > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if distributed else None
        self.snapshot = Snapshot(self.world.device)
        self.executor = futures.ThreadPoolExecutor(
            1, "checkpoint", initializer=lower_priority, initargs=(self.world.device,)
        )
        self.in_flight: futures.Future[SaveResult] | None = None
        self.reservation: futures.Future[None] | None = None
        self.last_save_time = time.monotonic()

    # called by the training ---------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Allocate the snapshot in the background; to be called once the optimizer has its state, after the
        first step.
        """
        self.reservation = self.executor.submit(self.snapshot.reserve, specs_of(slices_of(self.run)))

    def save(self) -> SaveResult | None:
        """Save the run as it is now; returns how the save before went, if that was still in flight.

        Collective.
        """
        start = time.perf_counter()
        previous = self.wait()
        self.run.statistics.synchronize(self.world)
        if self.reservation is not None:
            self.reservation.result()
        self.snapshot.copy(slices_of(self.run))
        manifest = manifest_of(self.run, self.versions)
        self.in_flight = self.executor.submit(self._write, manifest, time.perf_counter() - start)
        self.last_save_time = time.monotonic()
        return previous

    @property
    def overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed by this rank's clock."""
        minutes = self.options.every_minutes
        return minutes is not None and time.monotonic() - self.last_save_time > 60 * minutes

    def poll(self) -> SaveResult | None:
        """How the save in flight went, if it has ended since the last call."""
        return self.wait() if self.in_flight is not None and self.in_flight.done() else None

    def wait(self) -> SaveResult | None:
        """Wait for the save in flight, if there is one, and return how it went."""
        if self.in_flight is None:
            return None
        future, self.in_flight = self.in_flight, None
        return future.result()

    def wait_briefly(self) -> None:
        """After a failure: leave the save in flight a few seconds to be committed."""
        if self.in_flight is not None:
            futures.wait([self.in_flight], GRACE_AFTER_FAILURE_S)

    # in the background thread -------------------------------------------------------------------------------

    def _write(self, manifest: Manifest, blocking_s: float) -> SaveResult:
        """Write this rank's file; when all ranks have, rank zero commits."""
        start = time.perf_counter()
        folder = checkpoint_dir(self.run_dir, manifest.step)
        partial = partial_dir(self.run_dir, manifest.step)
        is_rank_zero = self.world.rank == 0
        error = first_error(error_of(lambda: self._write_file(partial), partial), self.group)
        if not error:
            if is_rank_zero:
                error = error_of(lambda: self._commit(manifest, partial, folder), folder)
            error = first_error(error, self.group)
        if error and is_rank_zero:
            shutil.rmtree(partial, ignore_errors=True)
        return SaveResult(
            step=manifest.step,
            blocking_s=blocking_s,
            write_s=time.perf_counter() - start,
            size=self.snapshot.size,
            error=error,
        )

    def _write_file(self, partial: Path) -> None:
        """Write this rank's slices, and beside them its part of the manifest: nothing is gathered through one
        process.
        """
        partial.mkdir(exist_ok=True)  # not its parents: what has vanished is not ours to make again
        path = partial / rank_file_name(self.world.rank)
        check_free_space(partial, self.snapshot.size)
        digest = write_hashed(path, self.snapshot.file_content(), self.run.phase.tick)
        entry = {"size": path.stat().st_size, "digest": digest, "tensors": self.snapshot.table()}
        write_text_atomically(path.with_suffix(".json"), json.dumps(entry))

    def _commit(self, manifest: Manifest, partial: Path, folder: Path) -> None:
        """Merge what the ranks wrote, rename the folder to its name, and remove old checkpoints."""
        files = [partial / rank_file_name(rank) for rank in range(self.world.world_size)]
        add_rank_files(manifest, files)
        for file in files:
            file.with_suffix(".json").unlink()
        manifest.write(partial)
        if folder.exists():
            remove_folder(folder)
        partial.rename(folder)
        sync(folder.parent)
        best_step = manifest.progress["best_step"] if self.options.best else None
        prune(self.run_dir, self.options.keep, best_step)


def rank_file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def add_rank_files(manifest: Manifest, files: list[Path]) -> None:
    """Add the files of all ranks to `manifest`, from what each rank wrote of its own beside it."""
    fragments: dict[str, list[tuple[int, int, int, int]]] = {}
    for index, path in enumerate(files):
        rank: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        manifest.files.append(FileEntry(name=path.name, size=rank["size"], digest=rank["digest"]))
        for name, (dtype, shape, start, numel, offset) in rank["tensors"].items():
            if name not in manifest.tensors:
                manifest.tensors[name] = TensorEntry(dtype=dtype, shape=shape, cuts=[0], files=[], offsets=[])
            fragments.setdefault(name, []).append((start, numel, index, offset))
    for name, of_tensor in fragments.items():
        entry = manifest.tensors[name]
        for start, numel, index, offset in sorted(of_tensor):
            assert start == entry.cuts[-1], f"the strategy leaves a gap or an overlap in {name} at {start}"
            entry.cuts.append(start + numel)
            entry.files.append(index)
            entry.offsets.append(offset)


def error_of(write: Callable[[], object], folder: Path) -> str:
    """Call `write`; returns the OSError that it raised, as a message, empty if none.

    `folder` stands in the message where the error names no file.
    """
    try:
        write()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or folder} on {socket.gethostname()}"
    return ""


def lower_priority(device: str) -> None:
    """In the new thread: let the training go first, and use this rank's own GPU (a new thread has the first
    one, in all ranks).
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    if device != "cpu":
        torch.cuda.set_device(device)
