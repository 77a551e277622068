"""Saving behind the training: it waits for a copy into host memory; a thread of each rank writes, rank zero's
commits.

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

from launch.checkpoint.directory import checkpoint_dir, checkpoints_dir, prune, remove_partial
from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.checkpoint.snapshot import Snapshot, kinds
from launch.cli.config import nested
from launch.runtime.collectives import first_error
from launch.runtime.files import check_free_space, remove_folder, sync, write_hashed, write_text_atomically
from strategies.sharded_state import TensorSlice, tied_names

if TYPE_CHECKING:
    from launch.state.run import Run

LAST_SAVE = 5.0
"""seconds that a run which has failed leaves to the save in flight"""
PATIENCE = timedelta(hours=2)
"""for the slowest rank's file: far beyond any write, short of for ever"""
NICENESS = 10
"""of the writing thread: where the cores are all busy, the training goes first"""


class SaveError(Exception):
    """The last checkpoint of a run could not be written; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save went. The same on all ranks, but for the times, which are this rank's own."""

    step: int
    blocking_s: float
    """seconds that the training waited: for the save before, and for the copy"""
    write: float
    """seconds from the copy to the commit"""
    size: int
    """bytes that this rank wrote"""
    problem: str
    """in words, why there is no checkpoint of this step; empty if there is"""


class CheckpointWriter:
    """Saves a run into its directory. All ranks make one, and call it at the same steps."""

    def __init__(self, run: Run, run_dir: Path, versions: Mapping[str, str]) -> None:
        self.run, self.run_dir, self.versions = run, run_dir, versions
        if run.world.rank == 0:
            checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
            remove_partial(run_dir)
        # a group of its own: the order of collectives among two threads that shared one would be left to
        # chance
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if run.world.world_size > 1 else None
        )
        self.snapshot = Snapshot(run.world.device)
        self.thread = futures.ThreadPoolExecutor(
            1, "checkpoint", initializer=lower_priority, initargs=(run.world.device,)
        )
        self.flying: futures.Future[SaveResult] | None = None
        self.reserved: futures.Future[None] | None = None
        self.last = time.monotonic()

    # asked by the training ----------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Make room for the copy, behind the training, as soon as the optimizer's state is there: after a
        first step.
        """
        self.reserved = self.thread.submit(self.snapshot.reserve, kinds(self.state()))

    def state(self) -> dict[str, TensorSlice]:
        """What this rank writes, by the names in the checkpoint."""
        states = {name: strategy.state() for name, strategy in self.run.strategies.items()}
        return {f"{name}/{entry}": part for name, state in states.items() for entry, part in state.items()}

    def save(self) -> SaveResult | None:
        """Save the run as it is now. Returns how the save before went, if it was still under way."""
        start = time.perf_counter()
        before = self.wait()
        self.run.statistics.synchronize(self.run.world)
        if self.reserved is not None:
            self.reserved.result()
        self.snapshot.take(self.state())
        manifest = self.manifest()
        self.flying = self.thread.submit(self.write, manifest, time.perf_counter() - start)
        self.last = time.monotonic()
        return before

    @property
    def overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed by this rank's clock."""
        minutes = self.run.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.last > 60 * minutes

    def finished(self) -> SaveResult | None:
        """How the save in flight went, if it has ended."""
        return self.wait() if self.flying is not None and self.flying.done() else None

    def wait(self) -> SaveResult | None:
        """Wait for the save in flight, if there is one, and return how it went."""
        if self.flying is None:
            return None
        flying, self.flying = self.flying, None
        return flying.result()

    def wait_briefly(self) -> None:
        """After a failure: leave the save in flight some time to become whole."""
        if self.flying is not None:
            futures.wait([self.flying], LAST_SAVE)

    def manifest(self) -> Manifest:
        """What is known of the checkpoint before it is written."""
        run = self.run
        return Manifest(
            step=run.progress.step,
            samples=run.progress.step * run.batch_plan.batch_size,
            time=round(time.time(), 3),
            progress=run.progress.state(),
            config=nested(run.config) | nested(run.recipe),
            train_samples=len(run.splits.train),
            optimizers={name: strategy.groups for name, strategy in run.strategies.items()},
            tied={name: tied_names(strategy.module) for name, strategy in run.strategies.items()},
            versions=dict(self.versions),
            writer={
                "strategy": run.config.strategy,
                "world_size": run.world.world_size,
                "local_world_size": run.world.local_world_size,
                "device": run.world.device.partition(":")[0],
                "launcher": run.world.launcher,
            },
        )

    # behind it, in the thread -------------------------------------------------------------------------------

    def write(self, manifest: Manifest, blocking_s: float) -> SaveResult:
        """Write this rank's file; when all ranks have, rank zero commits."""
        start = time.perf_counter()
        folder = checkpoint_dir(self.run_dir, manifest.step)
        partial = folder.with_name(f".{folder.name}.partial")
        first = self.run.world.rank == 0
        problem = first_error(attempt(partial, lambda: self.write_file(partial)), self.group)
        if not problem:
            problem = first_error(
                attempt(folder, lambda: self.commit(manifest, partial, folder)) if first else "", self.group
            )
        if problem and first:
            shutil.rmtree(partial, ignore_errors=True)
        return SaveResult(
            step=manifest.step,
            blocking_s=blocking_s,
            write=time.perf_counter() - start,
            size=self.snapshot.size,
            problem=problem,
        )

    def write_file(self, partial: Path) -> None:
        """This rank's ranges, and beside them its part of the manifest: nothing is gathered through one
        process.
        """
        partial.mkdir(exist_ok=True)  # not its parents: what has vanished is not ours to make again
        path = partial / file_name(self.run.world.rank)
        check_free_space(partial, self.snapshot.size)
        digest = write_hashed(path, self.snapshot.content(), self.run.phase.tick)
        entry = {"size": path.stat().st_size, "digest": digest, "tensors": self.snapshot.table()}
        write_text_atomically(path.with_suffix(".json"), json.dumps(entry))

    def commit(self, manifest: Manifest, partial: Path, folder: Path) -> None:
        """Join what the ranks left, give the checkpoint its name, and remove those that it replaces."""
        files = [partial / file_name(rank) for rank in range(self.run.world.world_size)]
        join(manifest, files)
        for file in files:
            file.with_suffix(".json").unlink()
        manifest.write(partial)
        if folder.exists():
            remove_folder(folder)
        partial.rename(folder)
        sync(folder.parent)
        options = self.run.config.checkpoint
        prune(self.run_dir, options.keep, manifest.progress["best_step"] if options.best else None)


def file_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def join(manifest: Manifest, files: list[Path]) -> None:
    """Add to `manifest` what each rank says of its file."""
    parts: dict[str, list[tuple[int, int, int, int]]] = {}
    for index, path in enumerate(files):
        entry: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        manifest.files.append(FileEntry(name=path.name, size=entry["size"], digest=entry["digest"]))
        for name, (dtype, shape, start, numel, offset) in entry["tensors"].items():
            if name not in manifest.tensors:
                manifest.tensors[name] = TensorEntry(dtype=dtype, shape=shape, cuts=[0], files=[], offsets=[])
            parts.setdefault(name, []).append((start, numel, index, offset))
    for name, found in parts.items():
        tensor = manifest.tensors[name]
        for start, numel, index, offset in sorted(found):
            assert start == tensor.cuts[-1], f"the strategy leaves a gap or an overlap in {name} at {start}"
            tensor.cuts.append(start + numel)
            tensor.files.append(index)
            tensor.offsets.append(offset)


def attempt(folder: Path, write: Callable[[], object]) -> str:
    """What kept `write` from being done, in words; empty if nothing did."""
    try:
        write()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or folder} on {socket.gethostname()}"
    return ""


def lower_priority(device: str) -> None:
    """In the new thread: let others go first, and use this rank's own GPU (a new thread has the first one, in
    all ranks).
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    if device != "cpu":
        torch.cuda.set_device(device)
